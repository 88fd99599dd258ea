"""Module experts under ZeRO 3, checkpointed or not, after a base trained first: two ranks equal one."""

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
STEPS = 4
CASES = [
    ("task_level_moe_layers", True, "base first"),
    ("jiuzhang", False, "base first"),  # ranks choose other experts
    ("jiuzhang", True, "joint"),
    ("gupta_ffn", True, "base first"),
    ("scimult", False, "joint"),
]


def run_one(config: Config) -> int:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    with contextlib.chdir(ROOT):
        return train(config)


def weights(run: str) -> dict[str, torch.Tensor]:
    files = (Path(run) / f"checkpoint-{STEPS}").glob("*_model.safetensors")
    found = {n: t for file in files for n, t in load_file(file).items() if t.is_floating_point()}
    assert any(".stack." in name for name in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("method", "checkpointing", "phases"), CASES)
def test_zero_3_equals_one_rank(method, checkpointing, phases, spawn_ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(ROOT / "configs" / "methods" / f"{method}.yaml")
    assert config.data.skill_gym is not None
    gym = replace(config.data.skill_gym, train_rows=40, validation_rows=2, test_rows=2)
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    joint = PhaseConfig(train=tuple(config.phases[-1].train))
    base = PhaseConfig(name="base", steps=2, train=("base",), adapters=False)
    pair = replace(
        config, data=replace(config.data, skill_gym=gym), optim="sgd", learning_rate=0.05, max_steps=STEPS,
        phases=(joint,) if phases == "joint" else (base, replace(joint, name="experts")),
        router_learning_rate=None, task_embedding_learning_rate=None, per_device_train_batch_size=8,
        warmup_ratio=0.0, report_to=(), gradient_checkpointing=checkpointing,
        output_dir=str(tmp_path / "two"), deepspeed=str(zero),
    )  # fmt: skip
    one = replace(pair, output_dir=str(tmp_path / "one"), deepspeed=None, gradient_accumulation_steps=2)
    assert train(one) == 0
    assert spawn_ranks(run_one, config=pair, timeout_s=240) == [0, 0]
    found, expected = weights(pair.output_dir), weights(one.output_dir)
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= 1e-6 * largest, name
