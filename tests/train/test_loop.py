"""The loop: ranks and ZeRO stages agree, resumed equals uninterrupted, phases, stopping, the run folder."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.moe import ConfigError, TaskError, TaskMoEConfig
from taskmoe.train.config import (
    Config,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    SurgeryConfig,
    TokenizerConfig,
)
from taskmoe.train.data.errors import DataError
from taskmoe.train.loop import train
from taskmoe.train.step_surgery import StepSurgery
from taskmoe.train.track.log import read_log

GYM = SkillGymConfig(
    num_tasks=4,
    num_skills=4,
    train_rows=64,
    validation_rows=6,
    test_rows=4,
    min_string_length=2,
    max_string_length=4,
    alphabet_size=8,
)
LLAMA = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BASE = Config(
    model=LLAMA,
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=TaskMoEConfig(r=2, num_experts=3, router="task_mlp", router_scope="layer"),
    data=DataConfig(skill_gym=GYM, max_length=16),
    mixing=MixingConfig(strategy="equal"),
    max_steps=20,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    router_learning_rate=1e-3,
    warmup_ratio=0.0,
    phases=(PhaseConfig(train=("base", "experts", "router", "task_embedding")),),
    logging_steps=5,
    save_steps=10,
    save_total_limit=0,
    report_to=(),
)


def configs_for(folder: Path, stage: int) -> str:
    """A DeepSpeed file; under ZeRO-3 nothing persists, so that every tensor is partitioned."""
    zero: dict[str, int] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def weights(run: Path, step: int = 20) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    return {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "base_model.safetensors")}


def run_all(configs: list[Config]) -> list[int]:
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    return [train(config) for config in configs]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


@pytest.mark.parametrize(
    ("optim", "bound", "stages"),
    [
        ("sgd", 1e-6, range(4)),
        ("adamw_torch", 1e-5, [2]),  # its state in parts
        pytest.param("adamw_torch", 1e-5, [0, 1, 3], marks=pytest.mark.slow),
    ],
)
def test_ranks_and_zero_stages_reach_the_same_weights(spawn_ranks, tmp_path, optim, bound, stages):
    base = replace(
        BASE,
        optim=optim,
        learning_rate=1e-3 if optim == "adamw_torch" else 1e-1,
        router_learning_rate=1e-3 if optim == "adamw_torch" else 1e-1,
    )
    single = replace(base, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=4)
    assert train(single) == 0
    pair = [
        replace(base, output_dir=str(tmp_path / f"zero{z}"), deepspeed=configs_for(tmp_path, z))
        for z in stages
    ]
    assert spawn_ranks(run_all, configs=pair, timeout_s=240) == [[0] * len(pair)] * 2
    expected = weights(tmp_path / "one")
    start = weights(tmp_path / "one", 10)
    assert largest_difference(expected, start) > 100 * bound  # they did move
    for stage in stages:
        assert largest_difference(weights(tmp_path / f"zero{stage}"), expected) <= bound, f"ZeRO {stage}"


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_log(run / "trainer_log.jsonl")]


SURGERY = SurgeryConfig(method="pcgrad", refresh_every=3, matrix_steps=5, max_tasks=3)


@pytest.mark.parametrize("surgery", [SurgeryConfig(), SURGERY], ids=["plain", "surgery"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, surgery):
    # Dropout draws from the random state, length groups and phases from the sampler's: all must come back.
    data = replace(BASE.data, group_by_length_window=4)
    whole = replace(
        BASE,
        data=data,
        moe=replace(BASE.moe, lora_dropout=0.2),
        output_dir=str(tmp_path / "whole"),
        phases=(
            PhaseConfig(name="base", steps=6, train=("base",), adapters=False),
            PhaseConfig(name="experts", train=("experts", "router", "task_embedding")),
        ),
        save_steps=5,
        eval_steps=10,
        surgery=surgery,
    )
    assert train(whole) == 0
    logged = [line for line in untimed(tmp_path / "whole") if "grad/cosine_matrix" in line]
    assert len(logged) == (4 if surgery.method else 0)
    for stop in (5, 10):
        half = tmp_path / f"half-{stop}"
        part = replace(whole, output_dir=str(half))
        assert train(part) == 0
        for later in half.glob("checkpoint-*"):  # as if the run had died after `stop`
            if int(later.name.split("-")[1]) > stop:
                for path in sorted(later.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                later.rmdir()
        assert train(replace(part, resume_from_checkpoint="true")) == 0
        a, b = weights(tmp_path / "whole"), weights(half)
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert untimed(tmp_path / "whole") == untimed(half)


def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, monkeypatch):
    config = replace(BASE, output_dir=str(tmp_path / "run"), save_steps=None, max_steps=8)
    from taskmoe.train.loop import Run

    step = Run._step

    def with_signal(self, phase):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, phase)

    monkeypatch.setattr(Run, "_step", with_signal)
    assert train(config) == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    monkeypatch.setattr(Run, "_step", step)
    assert train(replace(config, resume_from_checkpoint="true")) == 0
    assert train(replace(config, output_dir=str(tmp_path / "whole"))) == 0
    a, b = weights(tmp_path / "run", 8), weights(tmp_path / "whole", 8)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_phases_train_what_they_say(tmp_path):
    phases = (
        PhaseConfig(name="base", steps=4, train=("base",), adapters=False),
        PhaseConfig(name="experts", train=("experts", "router")),
    )
    config = replace(
        BASE,
        output_dir=str(tmp_path / "run"),
        phases=phases,
        max_steps=8,
        save_steps=2,
        moe=replace(BASE.moe, router="task_table"),
    )
    assert train(config) == 0
    at = {n: weights(tmp_path / "run", n) for n in (2, 4, 6, 8)}
    for name in at[2]:
        adapter = ".bank." in name or name.startswith("routing.")
        moved = [not torch.equal(at[a][name], at[b][name]) for a, b in ((2, 4), (4, 6), (6, 8))]
        if "rotary" in name:
            continue
        assert moved == ([False, True, True] if adapter else [True, False, False]), name


def test_saved_modules_start_from_a_base_that_was_trained_without_adapters(tmp_path):
    phases = (
        PhaseConfig(name="base", steps=3, train=("base",), adapters=False),
        PhaseConfig(name="rest", train=("experts", "router", "task_embedding", "saved")),
    )
    moe = replace(BASE.moe, modules_to_save=("norm",))
    config = replace(
        BASE, output_dir=str(tmp_path / "run"), phases=phases, max_steps=4, moe=moe, save_steps=3
    )
    assert train(replace(config, learning_rate=1e-2)) == 0
    before, after = weights(tmp_path / "run", 3), weights(tmp_path / "run", 4)
    name = "base_model.model.norm.saved.weight"
    trained = before["base_model.model.norm.original.weight"]
    assert torch.equal(trained, after["base_model.model.norm.original.weight"])
    assert not torch.equal(trained, torch.ones_like(trained))
    assert torch.equal(before[name], torch.ones_like(trained))  # not in use yet
    assert (after[name] - trained).abs().max() <= 1.1e-2  # one Adam step away from the trained original


def test_run_folder_and_early_stopping(tmp_path):
    config = replace(
        BASE,
        output_dir=str(tmp_path / "run"),
        eval_steps=2,
        save_steps=None,
        early_stopping_patience=1,
        learning_rate=1e-9,
        router_learning_rate=1e-9,
        phases=(PhaseConfig(train=("experts", "router")),),
        moe=TaskMoEConfig(r=1, num_experts=2),
    )
    assert train(config) == 0
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert {
        "config.yaml",
        "task_map.json",
        "trainer_log.jsonl",
        "trainable.txt",
        "tokenizer",
        "latest",
    } <= names
    assert {"checkpoint-2", "checkpoint-4"} <= names  # the best, and where patience ended: not step 20
    listed = (run / "trainable.txt").read_text().split()
    assert listed and all(".bank." in n or n.startswith("routing.") for n in listed)
    logged = read_log(run / "trainer_log.jsonl")
    assert any("eval/score" in line for line in logged)


def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    config = replace(BASE, output_dir=str(tmp_path / "run"), max_steps=2, save_steps=None)
    assert train(config) == 0
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    assert train(replace(config, overwrite_output_dir=True)) == 0


def test_a_loss_that_is_not_a_number_names_its_task(tmp_path, monkeypatch):
    from taskmoe.train import micro_batch
    from taskmoe.train.engine import TrainingError

    real = micro_batch.step_loss

    def poisoned(*args, **kwargs):
        loss, sums_T = real(*args, **kwargs)
        sums_T[1] = float("nan")
        return loss, sums_T

    monkeypatch.setattr(micro_batch, "step_loss", poisoned)
    with pytest.raises(TrainingError, match="not a number"):
        train(replace(BASE, output_dir=str(tmp_path / "run"), logging_steps=1, max_steps=2))


@pytest.mark.parametrize("surgery", [SurgeryConfig(), SurgeryConfig("gradvac")], ids=["plain", "surgery"])
def test_a_run_goes_on_with_more_tasks(tmp_path, monkeypatch, surgery):
    """Rows of files, one folder a task: a task is added between checkpoint and resume."""
    load, loaded = StepSurgery.load_state_dict, []

    def noted(self, state):
        loaded.append(state["method"]["method"]["phi"].shape[1])
        load(self, state)

    monkeypatch.setattr(StepSurgery, "load_state_dict", noted)
    root = tmp_path / "data"

    def write(task, answer):
        (root / task).mkdir(parents=True)
        lines = [json.dumps({"input": f"w{i % 7}", "output": answer}) for i in range(12)]
        (root / task / "train.jsonl").write_text("\n".join(lines))
        (root / task / "validation.jsonl").write_text("\n".join(lines[:2]))

    write("apple", "yes")
    write("berry", "no")
    data = DataConfig(root=str(root), max_length=16, cache_dir=str(tmp_path / "cache"))
    config = replace(
        BASE, data=data, output_dir=str(tmp_path / "run"), max_steps=4, moe=TaskMoEConfig(r=1, num_experts=2)
    )
    config = replace(config, surgery=surgery)
    config = replace(config, phases=(PhaseConfig(train=("base", "experts", "router")),), save_steps=2)
    assert train(config) == 0
    write("citrus", "yes")  # behind the others in the order of folders
    assert train(replace(config, max_steps=6, resume_from_checkpoint="true")) == 0
    after = weights(tmp_path / "run", 6)
    assert after["routing.router.logits_STHE"].shape[1] == 3
    logged = read_log(tmp_path / "run" / "trainer_log.jsonl")
    assert any("train/epochs/citrus" in line for line in logged)
    assert loaded == ([2] if surgery.method else [])  # the state of the two tasks there were
    assert any("weight/citrus" in line for line in logged) == (surgery.method is None)
    (root / "aaa").mkdir()
    with pytest.raises((TaskError, DataError)):  # a folder that would come first, and is empty
        train(replace(config, max_steps=8, resume_from_checkpoint="true"))
