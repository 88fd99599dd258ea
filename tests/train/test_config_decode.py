"""Plain values into settings: types, unknown keys, defaults."""

from __future__ import annotations

import pytest

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.train.config import Config, DataConfig, DatasetConfig, SkillGymConfig
from taskmoe.train.config_io import load


def test_defaults(settings) -> None:
    assert settings() == Config(
        model={"type": "llama", "hidden_size": 32}, data=DataConfig(skill_gym=SkillGymConfig()), max_steps=10
    )


def test_every_kind_of_value(write) -> None:
    got = load(
        write("""\
model_name_or_path: some/model
datasets:
  - {path: a.jsonl, name: a, labels: [no, yes, 3], weight: 2}
  - path: b.jsonl
learning_rate: 1e-3
weight_decay: "1e-2"
adam_epsilon: 1
max_steps: 1e3
bf16: true
report_to: none
resume_from_checkpoint: true
run_name: 7
moe:
  n_skills: 4
  target_modules: [q_proj, v_proj]
  layers_to_transform: 2
  rank_pattern: {mlp.up: 2}
mixing: {strategy: explicit}
evaluation:
  metrics: {a*: macro_f1}
phases:
  - {steps: 400, train: [experts]}
  - router_temperature: [2, 0.5]
""")
    )
    assert got.datasets[0] == DatasetConfig(name="a", path="a.jsonl", labels=("no", "yes", "3"), weight=2.0)
    assert (got.learning_rate, got.weight_decay, got.max_steps, got.bf16) == (0.001, 0.01, 1000, True)
    assert type(got.adam_epsilon) is float and type(got.max_steps) is int
    assert got.report_to == ("none",) and got.resume_from_checkpoint == "true" and got.run_name == "7"
    assert got.moe == TaskMoEConfig(
        num_experts=4, target_modules=("q_proj", "v_proj"), layers_to_transform=2, rank_pattern={"mlp.up": 2}
    )
    assert got.phases[0].train == ("experts",) and got.phases[1].router_temperature == (2.0, 0.5)
    assert got.evaluation.metrics == {"a*": "macro_f1"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("bf16: yes", "bf16: expected true or false, found 'yes'"),
        ("bf16: 1", "bf16: expected true or false, found 1"),
        ("seed: 1.5", "seed: expected a whole number, found 1.5"),
        ("seed: true", "seed: expected a whole number, found True"),
        ("seed: '3'", "seed: expected a whole number, found '3'"),
        ("learning_rate: fast", "learning_rate: expected a number, found 'fast'"),
        ("learning_rate: .nan", "learning_rate: expected a number, found nan"),
        ("learning_rate: true", "learning_rate: expected a number, found True"),
        ("run_name: true", "run_name: expected text, found True; put it in quotes"),
        ("run_name: 1.0", "run_name: expected text, found 1.0; put it in quotes"),
        ("moe: 3", "moe: expected a section of keys, found 3"),
        ("phases: 3", "phases: expected a list, found 3"),
        ("phases: [3]", "phases.0: expected a section of keys, found 3"),
        (
            "phases: [{router_temperature: [1]}]",
            "phases.0.router_temperature: expected a list of 2, found [1]",
        ),
        ("task_weights: [1]", "task_weights: expected a mapping, found [1]"),
        ("task_weights: {a: b}", "task_weights.a: expected a number, found 'b'"),
        ("evaluation: {metrics: {a: null}}", "evaluation.metrics.a: expected text, found None"),
        ("moe: {n_skills: 2, num_experts: 3}", "moe.n_skills: is another name of moe.num_experts"),
    ],
)
def test_values_of_another_type(write_run, fails, text: str, message: str) -> None:
    path = write_run(text)
    assert fails(load, path).startswith(f"{path}:5: {message}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "learning_rat: unknown key; the nearest is learning_rate"),
        ("moe: {num_expert: 1}", "moe.num_expert: unknown key; the nearest is moe.num_experts"),
        ("max_length: 1", "max_length: unknown key; the nearest is data.max_length"),
        ("lr: 1", "lr: unknown key; the nearest are learning_rate, loss_reduction"),
        ("moe: {learning_rate: 1}", "moe.learning_rate: unknown key; the nearest is learning_rate"),
        ("phases: [{step: 1}]", "phases.0.step: unknown key; the nearest is phases.0.steps"),
        ("datasets: [{paht: a}]", "datasets.0.paht: unknown key; the nearest is datasets.0.path"),
    ],
)
def test_unknown_keys_name_the_nearest(write_run, fails, text: str, message: str) -> None:
    path = write_run(text)
    assert fails(load, path) == f"{path}:5: {message}"
