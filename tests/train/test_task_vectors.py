"""Vectors of tasks from texts: by definition, and through a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from taskmoe.moe import ConfigError, TaskMoEConfig
from taskmoe.moe.representations.files import read_vectors
from taskmoe.train.config import Config, DataConfig, MixingConfig, PhaseConfig, TokenizerConfig
from taskmoe.train.loop import train
from taskmoe.train.models import build_model
from taskmoe.train.run_eval import score_run
from taskmoe.train.setup import saved_tokenizer
from taskmoe.train.task_vectors import text_vectors

TEXTS = {"a": ["1 2 3", "4", "5 6 7 8 9 10 11 12"], "b": ["13 14"]}


def encoder(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=16))  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, pad_token_id=0,
                                            num_attention_heads=2, num_key_value_heads=2,
                                            intermediate_size=16))  # fmt: skip
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2,
                                               num_heads=2, decoder_start_token_id=0))  # fmt: skip


def numbers(texts, padding, truncation, max_length, return_tensors):
    """A tokenizer: words are ids; padded on the right."""
    rows = [[int(w) for w in text.split()][:max_length] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_text_vectors_are_means_over_tokens_then_over_texts(kind):
    model = encoder(kind).train()
    found = text_vectors(model, numbers, TEXTS, max_length=6, batch_size=2)
    assert model.training and next(model.parameters()).grad is None
    body = model.get_encoder() if kind == "t5" else model.base_model
    body.eval()
    for task, texts in TEXTS.items():
        by_text = []
        for text in texts:  # one at a time: nothing is padded
            ids = torch.tensor([[int(w) for w in text.split()][:6]])
            by_text.append(body(input_ids=ids).last_hidden_state[0].mean(0))
        assert torch.allclose(found[task], torch.stack(by_text).mean(0), atol=1e-6), task
    with pytest.raises(ValueError, match="task 'c' has no text"):
        text_vectors(model, numbers, {"c": []})
    with pytest.raises(ValueError, match="task 'c' has a text without a token"):
        text_vectors(model, numbers, {"c": ["1", ""]})


def write_task(root: Path, task: str, word: str) -> None:
    (root / task).mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 3)):
        rows = [{"input": f"{word} w{i % 7}", "output": "yes"} for i in range(count)]
        (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def config(tmp_path) -> Config:
    for task, word in (("apple", "red"), ("berry", "blue")):
        write_task(tmp_path / "data", task, word)
    return Config(
        model={"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
               "num_attention_heads": 2, "num_key_value_heads": 2},
        tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=64),
        moe=TaskMoEConfig(r=2, num_experts=3, router="task_linear", router_scope="layer",
                          representation="text", representation_options={"rows": 5}),
        data=DataConfig(root=str(tmp_path / "data"), max_length=16, cache_dir=str(tmp_path / "cache")),
        mixing=MixingConfig(strategy="equal"),
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        phases=(PhaseConfig(train=("base", "experts", "router")),),
        save_steps=2,
        save_total_limit=9,
        report_to=(),
    )  # fmt: skip


NAME = "routing.representation.vectors_TD"


def test_a_run_makes_them_of_training_rows_and_keeps_them(config, tmp_path):
    assert train(config) == 0
    run = tmp_path / "run"
    tokenizer = saved_tokenizer(run / "tokenizer")
    texts = {"apple": [f"red w{i}" for i in range(5)], "berry": [f"blue w{i}" for i in range(5)]}
    expected = text_vectors(build_model(config, tokenizer, []), tokenizer, texts)
    made = read_vectors(run / "task_vectors.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.allclose(made[n], v, atol=1e-6) for n, v in expected.items())
    assert not torch.allclose(made["apple"], made["berry"])
    saved = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    assert torch.equal(saved[NAME], torch.stack([made["apple"], made["berry"]]))
    _, before = score_run(run)
    shutil.move(run, tmp_path / "moved")
    (tmp_path / "moved" / "task_vectors.safetensors").unlink()
    _, after = score_run(tmp_path / "moved")
    assert after["tasks"] == before["tasks"], "the checkpoint has its own"


def test_known_tasks_keep_theirs_and_new_ones_get_one(config, tmp_path):
    assert train(config) == 0
    run = tmp_path / "run"
    first = load_file(run / "checkpoint-4" / "adapter_model.safetensors")[NAME]
    write_task(tmp_path / "data", "citrus", "green")
    assert train(replace(config, max_steps=6, resume_from_checkpoint="true")) == 0
    grown = load_file(run / "checkpoint-6" / "adapter_model.safetensors")
    assert torch.equal(grown[NAME][:2], first) and grown[NAME].shape[0] == 3
    assert torch.equal(grown[NAME][2], read_vectors(run / "task_vectors.safetensors")["citrus"])
    assert not torch.allclose(grown[NAME][2], first.mean(0)), "not the mean of the others, but its own"


def test_an_encoder_that_is_not_there(config, tmp_path):
    options = {"model": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match=r"moe.representation_options.model: no encoder in "):
        train(replace(config, moe=replace(config.moe, representation_options=options)))
    with pytest.raises(ConfigError, match=r"moe.representation_options.modle: unknown option"):
        train(replace(config, moe=replace(config.moe, representation_options={"modle": "base"})))
