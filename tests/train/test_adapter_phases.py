"""Adapters, generated adapters and fusion as runs: two ranks under ZeRO equal one, phases, resuming."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe import TaskMoEConfig
from taskmoe.train.config import (
    Config,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    SurgeryConfig,
    TokenizerConfig,
)
from taskmoe.train.loop import train

STEPS = 8
GYM = SkillGymConfig(
    num_tasks=3, num_skills=4, train_rows=32, validation_rows=3, test_rows=3, min_string_length=2,
    max_string_length=4, alphabet_size=8,
)  # fmt: skip
BASE = Config(
    model={"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2},
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    data=DataConfig(skill_gym=GYM, max_length=16),
    mixing=MixingConfig(strategy="equal"),
    optim="sgd",
    learning_rate=0.1,
    router_learning_rate=0.1,
    warmup_ratio=0.0,
    max_steps=STEPS,
    per_device_train_batch_size=6,
    save_steps=4,
    save_total_limit=0,
    report_to=(),
)  # fmt: skip
JOINT = (PhaseConfig(train=("base", "experts", "router", "task_embedding")),)
TWO = (PhaseConfig(name="adapters", steps=4, train=("base", "experts")), PhaseConfig(train=("router",)))
SMALL = {"bank": "generated", "r": 2, "task_embedding_dim": 4}
METHODS = {
    "adapter": replace(BASE, moe=TaskMoEConfig(bank="adapter", r=2, num_experts=3), phases=JOINT),
    "generated": replace(
        BASE, moe=TaskMoEConfig(**SMALL, bank_options={"hidden": 6, "dim": 5}), phases=JOINT
    ),
    "generated, a set a block": replace(
        BASE, moe=TaskMoEConfig(**SMALL, bank_options={"hidden": 6, "dim": 5, "share": "block"}), phases=JOINT
    ),
    "fusion": replace(
        BASE, moe=TaskMoEConfig(bank="fusion", r=2, num_experts=3, router="none", gate="uniform"), phases=TWO
    ),
}


def zero(folder: Path, stage: int) -> str:
    """A DeepSpeed file; under ZeRO-3 nothing persists, so that every tensor is partitioned."""
    settings: dict[str, int] = {"stage": stage}
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": settings}))
    return str(path)


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    found = {}
    for name in ("adapter_model", "base_model"):
        if (folder / f"{name}.safetensors").exists():
            found.update(load_file(folder / f"{name}.safetensors"))
    return found


def run_all(configs: list[Config]) -> list[int]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    return [train(config) for config in configs]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "generated" else pytest.mark.slow) for m in METHODS]
)
def test_two_ranks_equal_one_process(method, spawn_ranks, tmp_path):
    surgery = SurgeryConfig(method="pcgrad")
    joint = METHODS[method].phases == JOINT
    frozen = (PhaseConfig(train=("experts", "router", "task_embedding")),)
    plain = {"plain": METHODS[method]}
    cases = {**plain, "surgery": replace(METHODS[method], surgery=surgery, phases=frozen)} if joint else plain
    for name, config in cases.items():
        assert train(replace(config, output_dir=str(tmp_path / name), gradient_accumulation_steps=2)) == 0
    pair = [
        replace(config, output_dir=str(tmp_path / f"{name}-{stage}"), deepspeed=zero(tmp_path, stage))
        for name, config in cases.items()
        for stage in (2, 3)
    ]
    assert spawn_ranks(run_all, configs=pair, timeout_s=300) == [[0] * len(pair)] * 2
    for name in cases:
        expected = weights(tmp_path / name)
        assert difference(expected, weights(tmp_path / name, 4)) > 1e-4  # they did move
        for stage in (2, 3):
            found = weights(tmp_path / f"{name}-{stage}")
            assert difference(found, expected) <= 1e-6, f"{name}, ZeRO {stage}"


@pytest.mark.parametrize("method", ["generated", "fusion"])
def test_resumed_equals_uninterrupted(method, tmp_path):
    config = replace(METHODS[method], save_steps=2, output_dir=str(tmp_path / "whole"))
    assert train(config) == 0
    for step in (2, 4, 6):  # 4 is between the phases
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        for later in range(step + 2, STEPS + 1, 2):  # as if the run had died after `step`
            shutil.rmtree(folder / f"checkpoint-{later}")
        assert train(replace(config, output_dir=str(folder), resume_from_checkpoint="true")) == 0
        assert difference(weights(folder), weights(tmp_path / "whole")) == 0


def test_each_phase_of_fusion_moves_what_it_names(tmp_path):
    config = replace(METHODS["fusion"], optim="adamw_torch", learning_rate=1e-2, router_learning_rate=1e-2)
    assert train(replace(config, output_dir=str(tmp_path), save_steps=2)) == 0
    moved = [
        {n for n, w in weights(tmp_path, step).items() if not torch.equal(w, weights(tmp_path, step - 2)[n])}
        for step in (4, 8)
    ]
    names = set(weights(tmp_path))
    assert moved == [{n for n in names if ".attention." not in n}, {n for n in names if ".attention." in n}]


def test_without_gates_there_is_no_control_with_uniform_ones(tmp_path):
    expected = {"adapter": {"experts", "disabled", "uniform"}, "generated": {"experts", "disabled"}}
    short = replace(BASE.evaluation, controls=True, max_new_tokens=2)
    for method, arms in expected.items():
        config = replace(METHODS[method], max_steps=2, save_steps=None, evaluation=short)
        assert train(replace(config, output_dir=str(tmp_path / method))) == 0
        found = json.loads((tmp_path / method / "eval_results.json").read_text())
        assert {n for n, arm in found.items() if isinstance(arm, dict) and "tasks" in arm} == arms
