"""A run of two tasks whose prompts say little and whose answers never change, and tasks new to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from taskmoe.moe import TaskMoEConfig
from taskmoe.train.adapt.settings import AdaptSettings
from taskmoe.train.config import (
    Config,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    MixingConfig,
    PhaseConfig,
    TokenizerConfig,
)
from taskmoe.train.loop import train

MODEL = {
    "type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
QUICK = {
    "max_steps": 40,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.03,
    "router_learning_rate": 0.3,
    "eval_steps": 5,
    "early_stopping_patience": 8,
}


def write_task(folder: Path, prompts: Sequence[str], answer: str) -> DatasetConfig:
    """A folder of a task whose answer is always the same."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"input": prompt, "output": answer}) + "\n" for prompt in prompts)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(lines)
    return DatasetConfig(name=folder.name, path=str(folder))


def prompts_of(own: str) -> list[str]:
    """Eight that every task has, and four of its own."""
    return [f"w{i % 4} w{i % 3}" for i in range(8)] + [f"{own} {own} w{i}" for i in range(4)]


def make_run(folder: Path, moe: TaskMoEConfig, train_groups: Sequence[str], **settings: Any) -> Path:
    """The run folder: apple answers yes, berry no."""
    for name, own, answer in (("apple", "red", "yes"), ("berry", "blue", "no")):
        write_task(folder / "data" / name, prompts_of(own), answer)
    config = Config(
        model=MODEL,
        tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
        moe=moe,
        data=DataConfig(root=str(folder / "data"), max_length=16, cache_dir=str(folder / "cache")),
        mixing=MixingConfig(strategy="equal"),
        evaluation=EvaluationConfig(max_new_tokens=2),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        warmup_ratio=0.0,
        phases=(PhaseConfig(train=tuple(train_groups)),),
        report_to=(),
        output_dir=str(folder / "run"),
        **settings,
    )
    assert train(config) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routed by a table of tasks."""
    moe = TaskMoEConfig(r=2, num_experts=3, router_init_std=1.0)
    return make_run(tmp_path_factory.mktemp("adapt"), moe, ("base", "experts", "router"))


@pytest.fixture(scope="session")
def new_tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetConfig, ...]:
    """citrus answers as berry does, date as apple, whose prompts it has, too."""
    folder = tmp_path_factory.mktemp("new")
    return (
        write_task(folder / "citrus", [f"w{i % 4} w{i % 3}" for i in range(12)], "no"),
        write_task(folder / "date", ["red red w1", "red w0 red"] * 6, "yes"),
    )


@pytest.fixture(scope="session")
def run_with() -> Callable[..., Path]:
    """:func:`make_run`."""
    return make_run


@pytest.fixture(scope="session")
def settings(new_tasks: tuple[DatasetConfig, ...]) -> Callable[..., AdaptSettings]:
    """``settings(**changed)``: quick ones, with both new tasks."""
    return lambda **changed: AdaptSettings(**{"datasets": new_tasks, **QUICK, **changed})
