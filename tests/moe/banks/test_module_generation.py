"""generate() with module experts: a cache for each expert changes nothing; squeezed models agree."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.moe.banks.module.stack import CacheError
from taskmoe.moe.squeeze import squeeze

TASKS = ["a", "b", "c"]
MIX = [2, 0, 1]
LENGTH = 6
SETTINGS = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "output_scores": True,
            "return_dict_in_generate": True}  # fmt: skip
GATES = {"softmax": {}, "top_k": {"top_k": 2}, "one_hot": {}}


@pytest.fixture(params=("llama", "gpt2", "t5"))
def decoder(request):
    return request.param


@pytest.fixture
def experts(tiny, shaken):
    def make(kind, of, gate="softmax"):
        config = TaskMoEConfig(num_experts=3, bank="module", bank_options={"of": of}, gate=gate,
                               router_init_std=0.5, **GATES[gate])  # fmt: skip
        return shaken(attach(tiny(kind), config, TASKS)).double().eval()

    return make


@pytest.fixture
def prompts(batch):
    def make(kind):
        inputs = batch(kind, MIX)
        return {n: v for n, v in inputs.items() if n in ("input_ids", "attention_mask")}

    return make


def same(found, expected, close):
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores) == LENGTH
    for a, b in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(a.isinf(), b.isinf())
        close(a.masked_fill(a.isinf(), 0.0), b.masked_fill(b.isinf(), 0.0), 1e-10)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("of", ["layer", "attention", "ffn"])
def test_a_cache_changes_nothing(decoder, of, gate, beams, experts, prompts, close):
    model, inputs = experts(decoder, of, gate), prompts(decoder)
    settings = {**SETTINGS, "num_beams": beams}
    without = model.generate(**inputs, task_ids=MIX, use_cache=False, **settings)
    same(model.generate(**inputs, task_ids=MIX, use_cache=True, **settings), without, close)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("of", ["layer", "attention"])
def test_mixed_tasks_equal_each_sequence_in_its_squeezed_model(decoder, of, beams, experts, prompts):
    model, inputs = experts(decoder, of, "one_hot"), prompts(decoder)
    settings = {**SETTINGS, "num_beams": beams}
    together = model.generate(**inputs, task_ids=MIX, **settings).sequences
    for i, task in enumerate(MIX):
        one = {n: v[i : i + 1] for n, v in inputs.items()}
        alone = squeeze(model, TASKS[task]).generate(**one, **settings).sequences
        assert torch.equal(together[i], alone[0])


def test_every_expert_keeps_its_own_entries(experts, prompts):
    model, inputs = experts("llama", "layer"), prompts("llama")
    cache = model(**inputs, task_ids=MIX, use_cache=True).past_key_values
    assert len(cache.layers) == 2 * 3
    keys = [layer.keys for layer in cache.layers]
    assert not torch.equal(keys[0], keys[2])  # layer 0, first and second expert
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_left_padded_prompts(experts, prompts):
    model, inputs = experts("llama", "layer"), prompts("llama")
    inputs["attention_mask"][0, :4], inputs["input_ids"][0, :4] = 0, 0
    together = model.generate(**inputs, task_ids=MIX, **SETTINGS).sequences
    short = inputs["input_ids"][:1, 4:]
    alone = model.generate(short, attention_mask=torch.ones_like(short), task_ids=MIX[:1], **SETTINGS)
    assert torch.equal(together[0, -LENGTH:], alone.sequences[0, -LENGTH:])


def test_a_sliding_window_slides_for_every_expert(shaken, close):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = MistralConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, sliding_window=5, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = TaskMoEConfig(num_experts=3, bank="module", router_init_std=0.5)
    model = shaken(attach(MistralForCausalLM(settings), config, TASKS)).double().eval()
    ids = torch.randint(4, 61, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": MIX}
    without = model.generate(**inputs, use_cache=False, **SETTINGS)
    same(model.generate(**inputs, **SETTINGS), without, close)
    cache = model(**inputs, use_cache=True).past_key_values
    assert {layer.keys.shape[2] for layer in cache.layers} == {4}


def test_a_cache_without_room_is_refused(experts, prompts):
    model, inputs = experts("llama", "layer"), prompts("llama")
    with pytest.raises(CacheError, match=r"model\.layers\.0: .*StaticCache has no room for"):
        model.generate(**inputs, task_ids=MIX, cache_implementation="static", **SETTINGS)
    static = StaticCache(config=model.base_model.config, max_cache_len=32)
    with pytest.raises(CacheError, match="use_cache=False"):
        model(**inputs, task_ids=MIX, past_key_values=static)


def test_ffns_take_any_cache(experts, prompts):
    model, inputs = experts("llama", "ffn"), prompts("llama")
    expected = model.generate(**inputs, task_ids=MIX, **SETTINGS).sequences
    found = model.generate(**inputs, task_ids=MIX, cache_implementation="static", **SETTINGS).sequences
    assert torch.equal(found, expected)
