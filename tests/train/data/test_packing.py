from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.train.config import Config
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.packing import pack, require_packing, supports_packing

VOCABULARY = 40
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def build(name: str, attention: str = "sdpa") -> Any:
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation=attention))
    if name == "mistral":  # a sliding window
        return MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=3, attn_implementation=attention))
    if name == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        config._attn_implementation = attention
        return GPT2LMHeadModel(config)
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4}  # fmt: skip
    if name == "bert":
        return BertLMHeadModel(BertConfig(**small))
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )


def test_first_fit_keeps_every_row_once_within_the_limit() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 12) for _ in range(200)]
    packs = pack(lengths, 12)
    assert sorted(i for one in packs for i in one) == list(range(200))
    assert all(sum(lengths[i] for i in one) <= 12 for one in packs)
    assert len(packs) <= 1.15 * sum(lengths) / 12
    assert pack([5, 4, 3, 2], 8) == [[0, 2], [1, 3]]
    assert pack([9, 1], 8) == [[0], [1]]
    assert pack([], 8) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_packed_logits_are_those_of_rows_alone(name: str, attention: str) -> None:
    model = build(name, attention).eval()
    model.config.use_cache = True  # transformers' own default
    rng = random.Random(1)
    rows = [
        {"task": i % 3, "input_ids": ids, "labels": ids, "prompt_length": 1}
        for i, ids in enumerate(
            [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (5, 1, 7, 3, 4, 1, 2)]
        )
    ]
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    batch = Collator(tokenizer, "CAUSAL_LM", 3, packing=True, max_length=11)(rows)
    assert len(batch["input_ids"]) > 1
    assert (batch["segment_ids"] == -1).any()
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for place, row in enumerate(batch["order"]):
            alone = model(input_ids=torch.tensor([rows[row]["input_ids"]])).logits[0]
            found = packed[batch["segment_ids"] == place]
            assert (found - alone).abs().max() <= 1e-6 * packed.abs().max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_models_that_keep_rows_apart_may_pack(name: str, training: bool) -> None:
    model = build(name).train(training)
    assert supports_packing(model, Config()) is None
    require_packing(model, Config())
    assert model.training is training


@pytest.mark.parametrize(
    ("name", "task_type", "words"),
    [
        ("t5", "SEQ_2_SEQ_LM", "task_type SEQ_2_SEQ_LM cannot pack"),
        ("t5", "CAUSAL_LM", "t5 is an encoder-decoder"),
        ("bert", "CAUSAL_LM", "bert with attn_implementation sdpa lets packed rows see each other"),
        ("llama", "SEQ_CLS", "task_type SEQ_CLS cannot pack"),
    ],
)
def test_others_are_refused_in_one_line(name: str, task_type: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        require_packing(build(name), Config(task_type=task_type))
    assert str(error.value).startswith(f"data.packing: {words}")
    assert "\n" not in str(error.value)


def test_prompts_have_no_place_in_a_row_of_several_tasks() -> None:
    with pytest.raises(ConfigError, match=r"data.packing: moe.bank 'prompt' takes no rows of sev"):
        require_packing(build("llama"), Config(moe=TaskMoEConfig(bank="prompt")))


class _NoPositions(torch.nn.Module):
    """A causal model by its looks, with one flaw a subclass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        return self.inner(input_ids=input_ids, use_cache=False)


class _Ignored(_NoPositions):
    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **inputs: Any) -> Any:
        return self.inner(input_ids=input_ids, use_cache=False)


class _Masked(_NoPositions):
    """Keeps rows apart by a mask of its own, but counts positions through."""

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **inputs: Any) -> Any:
        L = input_ids.shape[1]
        start = (
            torch.zeros(L, dtype=torch.int64) if position_ids is None else (position_ids[0] == 0).cumsum(0)
        )
        mask = (start[:, None] == start[None, :]) & torch.ones(L, L, dtype=torch.bool).tril()
        return self.inner(input_ids=input_ids, attention_mask=mask[None, None], use_cache=False)


@pytest.mark.parametrize(
    ("wrapper", "words"),
    [
        (_NoPositions, "gpt2 takes no position_ids"),
        (_Ignored, "lets packed rows see each other"),
        (_Masked, "does not restart positions"),
    ],
)
def test_the_forward_decides_not_the_name(wrapper: type[_NoPositions], words: str) -> None:
    reason = supports_packing(wrapper(build("gpt2")), Config())
    assert reason is not None
    assert words in reason


def test_attention_backends() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert supports_packing(model, Config()) is None
    model.config._attn_implementation = "paged|sdpa"
    assert "is not known to keep packed rows apart" in (supports_packing(model, Config()) or "")
