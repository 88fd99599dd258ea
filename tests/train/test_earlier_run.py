"""A run's folder as the model of another run: base and tokenizer, from whatever stood beside the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskTable
from taskmoe.train.config import Config, DataConfig, PhaseConfig, SkillGymConfig, TokenizerConfig
from taskmoe.train.distributed import Ranks
from taskmoe.train.earlier_run import EarlierRun, earlier_run
from taskmoe.train.loop import train
from taskmoe.train.models import build_model, build_tokenizer
from taskmoe.train.setup import build_moe
from taskmoe.train.weights import base_state, save_base

MODEL = {"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
BANKS: dict[str, Any] = {
    "low_rank": {"r": 2, "num_experts": 2, "modules_to_save": ("lm_head",)},
    "module": {"bank": "module", "num_experts": 2, "bank_options": {"of": "layer"}},
    "prompt": {"bank": "prompt", "bank_options": {"length": 2}},
}


@pytest.fixture(scope="module", params=BANKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps that trained its base, and what it attached."""
    config = Config(
        model=MODEL,
        tokenizer=TokenizerConfig("wordlevel", 64),
        moe=TaskMoEConfig(**BANKS[request.param]),
        data=DataConfig(skill_gym=SkillGymConfig(num_tasks=2, train_rows=8, validation_rows=2, test_rows=2)),
        phases=(PhaseConfig(steps=1, train=("base",), adapters=False), PhaseConfig(train=("experts",))),
        max_steps=2,
        warmup_ratio=0.0,
        per_device_train_batch_size=4,
        report_to=(),
        output_dir=str(tmp_path_factory.mktemp("earlier") / "run"),
    )
    assert train(config) == 0
    return config


def on(config: Config, folder: str | Path) -> Config:
    return replace(config, model=None, model_name_or_path=str(folder), tokenizer=TokenizerConfig())


def test_the_base_is_the_one_that_the_run_left(run):
    folder = Path(run.output_dir)
    tasks = TaskTable.load(folder / "task_map.json")
    tokenizer = build_tokenizer(on(run, folder))
    fresh = build_model(run, tokenizer, tasks).state_dict()
    saved = load_file(folder / "checkpoint-2" / "base_model.safetensors")
    for name in (folder, folder / "checkpoint-2"):
        found = build_model(on(run, name), tokenizer, tasks).state_dict()
        assert found.keys() == fresh.keys() and any(not torch.equal(found[n], t) for n, t in fresh.items())
        around = build_moe(on(run, name), tokenizer, tasks, Ranks(0, 1, 0, torch.device("cpu"), False))
        own = dict(around.parameter_groups()["base"])
        assert own.keys() <= saved.keys() and all(torch.equal(p, saved[n]) for n, p in own.items())


def test_a_base_that_does_not_fit(run, tmp_path):
    folder = Path(run.output_dir)
    tasks = TaskTable.load(folder / "task_map.json")
    tokenizer = build_tokenizer(on(run, folder))
    earlier = earlier_run(str(folder))
    assert earlier is not None
    state = load_file(earlier.checkpoint / "base_model.safetensors")
    other = replace(earlier, checkpoint=tmp_path)
    (name, tensor), *_ = state.items()
    for wrong, message in (
        (
            {**state, name: tensor[:1].clone()},
            f"{name} of .* does not fit LlamaForCausalLM; use the task_type",
        ),
        ({n: t for n, t in state.items() if n != name}, "lacks .* of LlamaForCausalLM"),
    ):
        save_file(wrong, tmp_path / "base_model.safetensors")
        with pytest.raises(ConfigError, match=f"model_name_or_path: .*{message}"):
            other.load_base(build_model(run, tokenizer, tasks))


def test_what_is_no_run_and_a_run_without_a_whole_checkpoint(run, tmp_path):
    assert earlier_run(None) is None and earlier_run("owner/name") is None
    assert earlier_run(str(tmp_path)) is None
    home = tmp_path / "empty"
    (home / "tokenizer").mkdir(parents=True)
    (home / "config.yaml").write_text((Path(run.output_dir) / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"model_name_or_path: .*empty"):
        earlier_run(str(home))
    (home / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert earlier_run(str(home)) is None, "a model's folder stays one"


def test_a_classifier_keeps_its_encoder_and_gets_a_new_head(tmp_path):
    tasks = TaskTable()
    tasks.add("mood", ["bad", "good"])
    shape = {**MODEL, "type": "bert"}
    config = Config(model=shape, task_type="SEQ_CLS", moe=TaskMoEConfig(r=1, num_experts=1), seed=1)
    tokenizer = build_tokenizer(config, ["a b"])
    model = build_moe(config, tokenizer, tasks, Ranks(0, 1, 0, torch.device("cpu"), False))
    save_base(base_state(model), tmp_path)
    earlier, built = EarlierRun(tmp_path, tmp_path), build_model(replace(config, seed=2), tokenizer, tasks)
    head = built.classifier.weight.clone()
    with pytest.raises(ConfigError, match=r"lacks classifier\.bias of BertForSequenceClassification"):
        earlier.load_base(built)
    earlier.load_base(built, new_head=True)
    trained = build_model(config, tokenizer, tasks)
    assert torch.equal(built.classifier.weight, head)
    for name, p in built.bert.named_parameters():
        assert torch.equal(p, trained.bert.get_parameter(name)), name
    state = load_file(tmp_path / "base_model.safetensors")
    state.pop(next(name for name in state if "query.weight" in name or "query.base.weight" in name))
    save_file(state, tmp_path / "base_model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks bert.*query\.weight of BertForSequenceClassification"):
        earlier.load_base(built, new_head=True)
