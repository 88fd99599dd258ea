"""Two ranks under ZeRO 2 reach the weights that one rank reaches, method by method, or it is said why not."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.train.config import Config, PhaseConfig
from taskmoe.train.config_io import load
from taskmoe.train.loop import train

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
STEPS, BOUND = 4, 1e-6


def run_one(config: Config) -> int:
    """On a rank of the shared pair; files that a configuration names are relative to the project."""
    torch.set_num_threads(1)
    with contextlib.chdir(ROOT):
        return train(config)


def weights(run: Path, steps: int) -> dict[str, torch.Tensor]:
    files = (run / f"checkpoint-{steps}").glob("*_model.safetensors")
    found = {n: t for file in files for n, t in load_file(file).items() if t.is_floating_point()}
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_two_ranks_equal_one(path: Path, claims, spawn_ranks, on_short_runs, tmp_path, monkeypatch):
    stated = claims[path.stem]["two ranks"]
    if stated != "equal":
        assert stated.startswith("depends: ") and len(stated) > 20
        return
    monkeypatch.chdir(ROOT)
    config = on_short_runs(load(path))
    steps = min(STEPS, config.max_steps)
    assert config.data.skill_gym is not None
    gym = replace(config.data.skill_gym, train_rows=40, validation_rows=8, test_rows=8)
    groups = tuple(dict.fromkeys(group for phase in config.phases for group in phase.train))
    zero = tmp_path / "zero2.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    pair = replace(
        config,
        data=replace(config.data, skill_gym=gym),
        phases=(PhaseConfig(train=groups),),
        optim="sgd",
        learning_rate=0.05,
        router_learning_rate=None,
        task_embedding_learning_rate=None,
        max_steps=steps,
        per_device_train_batch_size=8,
        warmup_ratio=0.0,
        report_to=(),
        output_dir=str(tmp_path / "two"),
        deepspeed=str(zero),
    )
    one = replace(pair, output_dir=str(tmp_path / "one"), deepspeed=None, gradient_accumulation_steps=2)
    assert train(one) == 0
    assert spawn_ranks(run_one, config=pair, timeout_s=240) == [0, 0]
    found, expected = weights(tmp_path / "two", steps), weights(tmp_path / "one", steps)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name].double() - tensor.double()).abs().max()) <= BOUND, name
