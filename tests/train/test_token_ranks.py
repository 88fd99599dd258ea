"""Routing by token on two ranks and under ZeRO: the weights, and what is counted over a step, of one rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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

METHODS: dict[str, dict[str, Any]] = {
    "ranks": {"r": 1, "router": "ranks", "gate": "raw", "router_options": {"top_k": 2, "bias_step": 0.01}},
    "token_cluster": {"r": 1, "router": "token_cluster", "gate": "raw", "router_options": {"dim": 8}},
    "token_task_concat": {"router": "token_task_concat", "task_embedding_dim": 4, "router_hidden_dim": 5},
    "gate_per_task": {"router": "gate_per_task", "bank": "shared_a"},
    "mtl_lora": {"bank": "mtl_lora", "router_init_std": 0.5},
    "mix_and_match": {"bank": "mix_and_match", "router": "token_linear"},
    "own_keys": {"bank": "own_keys", "r": 6, "bank_options": {"top_k": 3}},
}
BASE = Config(
    model={
        "type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=TaskMoEConfig(),
    data=DataConfig(
        skill_gym=SkillGymConfig(
            num_tasks=3, num_skills=3, train_rows=24, validation_rows=4, test_rows=4, alphabet_size=6
        ),
        max_length=40,
    ),
    mixing=MixingConfig(strategy="equal"),
    max_steps=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    optim="sgd",
    learning_rate=1e-1,
    router_learning_rate=1e-1,
    warmup_ratio=0.0,
    phases=(PhaseConfig(train=("experts", "router", "task_embedding")),),
    report_to="none",
)  # fmt: skip


def run_all(configs: list[Config]) -> list[int]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    return [train(config) for config in configs]


def adapter(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "checkpoint-4" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("surgery", [SurgeryConfig(), SurgeryConfig("pcgrad")], ids=["plain", "pcgrad"])
def test_two_ranks_and_zero_reach_the_weights_of_one(surgery, spawn_ranks, tmp_path):
    pairs, expected = [], {}
    for name, settings in METHODS.items():
        moe = TaskMoEConfig.from_dict({"r": 2, "num_experts": 4, **settings})
        phases = BASE.phases
        if name != "token_task_concat":
            phases = (PhaseConfig(train=("experts", "router")),)
        if name == "own_keys":
            phases = (PhaseConfig(train=("experts",)),)
        config = replace(BASE, moe=moe, surgery=surgery, phases=phases)
        if name == "own_keys":
            config = replace(config, router_learning_rate=None)
        single = replace(config, output_dir=str(tmp_path / name), gradient_accumulation_steps=4)
        assert train(single) == 0
        expected[name] = adapter(single.output_dir)
        for stage in (2, 3):
            zero: dict[str, int] = {"stage": stage}
            if stage == 3:
                zero["stage3_param_persistence_threshold"] = 0
            path = tmp_path / f"zero{stage}.json"
            path.write_text(json.dumps({"zero_optimization": zero}))
            folder = f"{single.output_dir}-{stage}"
            pairs.append((name, replace(config, output_dir=folder, deepspeed=str(path))))
    configs = [config for _, config in pairs]
    assert spawn_ranks(run_all, configs=configs, timeout_s=400) == [[0] * len(configs)] * 2
    for name, config in pairs:
        found = adapter(config.output_dir)
        assert found.keys() == expected[name].keys()
        assert all(value.any() for tensor, value in expected[name].items() if ".bank.B_" in tensor), "moved"
        for tensor, value in expected[name].items():
            error = float((found[tensor] - value).abs().max())
            assert error <= 1e-5, f"{name}, {config.deepspeed}: {tensor} is {error} away"
    biases = [t for n, t in expected["ranks"].items() if n.endswith("bias_E")]
    assert any(bias.any() for bias in biases)
