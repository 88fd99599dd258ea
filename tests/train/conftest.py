"""Settings written as YAML, and run folders as training leaves them, made without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train import checkpoint
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_io import load
from taskmoe.train.distributed import Ranks
from taskmoe.train.track.log import JsonlLog

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
CONFIG = """\
model: {type: llama, hidden_size: 8}
moe: {r: 2, num_experts: 3, router: task_table, gate: softmax}
data: {skill_gym: {num_tasks: 4}}
max_steps: 20
"""
SMALL = """\
model: {type: llama, hidden_size: 32}
data:
  skill_gym: {}
max_steps: 10
"""


def save_routing(folder: Path, tasks: TaskTable, gates: Mapping[str, Tensor], level: str = "task") -> None:
    """What save_pretrained leaves of the routing, its config and its tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    Snapshot(level, gates).save(folder / "routing.safetensors")
    tasks.save(folder / "task_map.json")
    about = {"peft_type": "TASKMOE", "format": 1, "router": "task_table", "gate": "softmax", "num_experts": 3}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def results_of(scores: Mapping[str, float], metric: str = "exact_match") -> dict[str, Any]:
    """What ``evaluate`` returns for tasks with these scores."""
    mean = sum(scores.values()) / len(scores)
    tasks = {n: {metric: s, "loss": 1 - s, "rows": 10, "metric": metric} for n, s in scores.items()}
    return {"tasks": tasks, "macro": {metric: mean, "loss": 1 - mean}, "groups": dict(scores), "score": mean}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(name, gates, ...)``: a run folder with one checkpoint, by default at step 20."""

    def make(
        name: str,
        gates: Mapping[str, Tensor],
        *,
        groups: Sequence[str | None] = ("letters", "letters", "digits", "digits"),
        scores: Mapping[str, float] | None = None,
        first: Mapping[str, Tensor] | None = None,
        level: str = "task",
        log: Sequence[tuple[int, str, dict[str, Any]]] = (),
        config: str = CONFIG,
        step: int = 20,
    ) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        tasks = TaskTable()
        for i, group in enumerate(groups):
            tasks.add(f"Task {i}", group=group)
        (run / "config.yaml").write_text(config)
        tasks.save(run / "task_map.json")
        lines = JsonlLog(run / "trainer_log.jsonl")
        for line in log:
            lines.write(*line)
        lines.close()
        if first is not None:
            (run / "routing").mkdir()
            Snapshot(level, first).save(run / "routing" / "step-0.safetensors")

        def write(folder: Path) -> None:
            save_routing(folder, tasks, gates, level)

        checkpoint.save(run, step, write, {}, 0, set(), ALONE)
        if scores is not None:
            found = {"step": step, "best": None, "experts": results_of(scores)}
            (run / "eval_results.json").write_text(json.dumps(found))
        return run

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(text, name)``: a YAML file with this text."""

    def write_yaml(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


@pytest.fixture
def write_run(write: Callable[..., Path]) -> Callable[..., Path]:
    """The same of a run that lacks nothing: its own four lines, then the text."""
    return lambda text="", name="c.yaml": write(SMALL + text, name)


@pytest.fixture
def settings(write_run: Callable[..., Path]) -> Callable[..., Config]:
    """``settings(text, *overrides)``: what :func:`write_run` wrote, with overrides of a command line."""
    return lambda text="", *overrides: load(write_run(text), overrides)


@pytest.fixture
def fails() -> Callable[..., str]:
    """``fails(call, *args)``: the one line of the ConfigError that the call raises."""

    def message_of(call: Callable[..., Any], *args: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            call(*args)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return message_of
