"""Settings: decoding, overrides, inheritance, checks, and the way back to YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from taskmoe.moe.choices import SEAMS, readers_of
from taskmoe.moe.config import ALIASES, TaskMoEConfig
from taskmoe.moe.options import GENERAL, default_options
from taskmoe.train import config_overrides
from taskmoe.train.config import (
    Config,
    ConfigError,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    SurgeryConfig,
    TokenizerConfig,
    TrackConfig,
)
from taskmoe.train.config_checks import CHOICES, RANGES, validate
from taskmoe.train.config_comments import field_comments
from taskmoe.train.config_decode import known_paths, leaves
from taskmoe.train.config_idle import ineffective
from taskmoe.train.config_io import dump, load
from taskmoe.train.config_schema import schema
from taskmoe.train.schedule import REINIT

BASE = """\
model: {type: llama, hidden_size: 32}
data:
  skill_gym: {}
max_steps: 10
"""
L2 = "compose: before, gate: sigmoid, gate_options: {normalise: l2}"


@pytest.fixture
def write(tmp_path: Path):
    def write_yaml(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


@pytest.fixture
def settings(write):
    """Settings from BASE plus YAML text, plus overrides."""

    def read(text: str = "", *overrides: str) -> Config:
        return load(write(BASE + text), overrides)

    return read


def fails(call, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- decoding --------------------------------------------------------------------------------------------


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
def test_values_of_another_type(write, text: str, message: str) -> None:
    path = write(BASE + text)
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
def test_unknown_keys_name_the_nearest(write, text: str, message: str) -> None:
    path = write(BASE + text)
    assert fails(load, path) == f"{path}:5: {message}"


def test_a_missing_file_names_the_nearest(write, tmp_path: Path) -> None:
    write(BASE, "quickstart.yaml")
    message = fails(load, tmp_path / "quikstart.yaml")
    assert "no such config file; the nearest is" in message and message.endswith("quickstart.yaml")
    assert "no such config file" in fails(load, tmp_path)


# -- overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, path, value",
    [
        (["--data.max_length", "32"], "data.max_length", 32),
        (["--data.max_length=32"], "data.max_length", 32),
        (["--max_length", "32"], "data.max_length", 32),
        (["--r", "8"], "moe.r", 8),
        (["--n_skills", "3"], "moe.num_experts", 3),
        (["--skill_gym.num_tasks", "3"], "data.skill_gym.num_tasks", 3),
        (["--num_tasks", "3"], "data.skill_gym.num_tasks", 3),
        (["--seed", "3"], "seed", 3),  # the outermost, not data.skill_gym.seed
        (["--bf16"], "bf16", True),
        (["--bf16", "--seed", "3"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
        (["--run_name", "007"], "run_name", "007"),
        (["--run_name", "1e3"], "run_name", "1e3"),
        (["--run_name", "a: [b"], "run_name", "a: [b"),
        (["--run_name=--a=b"], "run_name", "--a=b"),
        (["--target_modules", "[q, v]"], "moe.target_modules", ("q", "v")),
        (["--target_modules", ".*(q|v)"], "moe.target_modules", ".*(q|v)"),
        (["--report_to", "none"], "report_to", ("none",)),
        (["--model.hidden_size", "64"], "model", {"type": "llama", "hidden_size": 64}),
        (["--model.rope.factor", "2"], "model", {"type": "llama", "hidden_size": 32, "rope": {"factor": 2}}),
        (["--task_weights.a.b", "2"], "task_weights", {"a.b": 2.0}),
        (["--metrics", "{a: f1}"], "evaluation.metrics", {"a": "f1"}),
        (["--phases.0.name", "x"], "phases.0.name", "x"),
        (["--phases.0.train", "[base]"], "phases.0.train", ("base",)),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", "true"),
        (["--warmup_steps", "2", "--warmup_steps", "3"], "warmup_steps", 3),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_overrides(settings, tokens: list[str], path: str, value: object) -> None:
    found = {p: v for p, v, _ in leaves(settings("", *tokens))}
    assert found[path] == value and type(found[path]) is type(value)


def test_overrides_of_lists(write) -> None:
    path = write("model_name_or_path: m\ndatasets: [{path: a.jsonl, name: a}]\n")
    got = load(
        path, ["--datasets.0.path", "b.jsonl", "--datasets.1.path", "c.jsonl", "--datasets.1.labels.0=x"]
    )
    assert got.datasets == (
        DatasetConfig(name="a", path="b.jsonl"),
        DatasetConfig(path="c.jsonl", labels=("x",)),
    )
    assert "index 3, but the list has 1 items" in fails(load, path, ["--datasets.3.path", "x"])
    two = ["--phases.0.steps", "400", "--phases.1.name", "second"]
    assert [(p.name, p.steps) for p in load(path, two).phases] == [("main", 400), ("second", None)]


@pytest.mark.parametrize(
    "tokens, message",
    [
        (["--max_lenght", "3"], "--max_lenght: unknown key; the nearest is data.max_length"),
        (["--data.max_lenght", "3"], "--data.max_lenght: unknown key; the nearest is data.max_length"),
        (["--seed"], "--seed: a value is missing"),
        (["--seed", "--bf16"], "--seed: a value is missing"),
        (["cfg.yaml"], "unexpected argument 'cfg.yaml'"),
        (["--bf16", "yes"], "unexpected argument 'yes'"),
        (["--seed", "x"], "--seed: seed: expected a whole number, found 'x'"),
        (["--seed", "[1"], "--seed:1: not YAML"),
        (["--max_length", "0"], "--max_length: data.max_length: 0 is out of range"),
        (["--data", "3", "--data.max_length", "3"], "--data: data: expected a section, found 3"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_overrides_that_cannot_be_used(settings, tokens: list[str], message: str) -> None:
    assert fails(settings, "", *tokens).startswith(message)


def test_an_ambiguous_short_name_lists_the_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class One:
        size: int = 1
        one: int = 1

    @dataclasses.dataclass(frozen=True)
    class Two:
        size: int = 1

    root = dataclasses.make_dataclass("Root", [("a", One, One()), ("b", Two, Two())], frozen=True)
    monkeypatch.setattr(config_overrides, "Config", root)
    assert config_overrides.resolve("one") == (["a", "one"], int)
    assert fails(config_overrides.resolve, "size") == "--size: ambiguous; write one of --a.size, --b.size"


def test_null_takes_back_what_the_file_says(settings) -> None:
    text = "mixing: {max_epochs: 2}\n"
    assert settings(text).mixing.max_epochs == 2.0
    assert "mixing.max_epochs: has no effect" in fails(settings, text, "--mixing.strategy", "equal")
    got = settings(text, "--mixing.strategy", "equal", "--mixing.max_epochs", "null")
    assert got.mixing == MixingConfig(strategy="equal")


# -- extends ---------------------------------------------------------------------------------------------


def test_extends_merges_sections_and_replaces_lists(write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(BASE + "moe: {n_skills: 2, r: 3}\nphases: [{steps: 4}, {name: b}]\n", "base.yaml")
    write("extends: ../base.yaml\nmoe: {r: 1}\nseed: 1\nlogging_steps: 3\n", "sub/mid.yaml")
    path = write(
        "extends: sub/mid.yaml\nmoe: {num_experts: 5}\nmodel: {hidden_size: 8}\n"
        "phases: [{name: c}]\nlogging_steps:\n"
    )
    got = load(path)
    assert got.moe == TaskMoEConfig(num_experts=5, r=1)
    assert got.model == {"type": "llama", "hidden_size": 8}
    assert got.phases == (PhaseConfig(name="c"),)
    assert got.seed == 1 and got.max_steps == 10
    assert got.logging_steps == Config().logging_steps
    write(BASE + "sed: 1\n", "base.yaml")  # a fault is reported where it stands
    assert fails(load, path).startswith(f"{tmp_path / 'sub' / '..' / 'base.yaml'}:5: sed: unknown key")


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: other.yaml", "extends: no file"),
        ("extends: c.yaml", "extends: c.yaml leads back to this file"),
        ("extends: [a]", "extends: expected the path of a YAML file, found ['a']"),
    ],
)
def test_extends_that_lead_nowhere(write, text: str, message: str) -> None:
    path = write(text)
    assert fails(load, path).startswith(f"{path}:1: {message}")


# -- checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "task_type: CAUSAL",
            "task_type: 'CAUSAL' is not one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, FEATURE_EXTRACTION; the",
        ),
        ("mixing: {strategy: unimx}", "mixing.strategy: 'unimx' is not one of"),
        ("optim: adamw", "optim: 'adamw' is not one of adamw_torch, sgd; the nearest is 'adamw_torch'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: 'cosin' is not one of linear, cosine, constant"),
        ("phases: [{train: [expert]}]", "phases.0.train: 'expert' is not one of"),
        ("phases: [{mixing: {strategy: x}}]", "phases.0.mixing.strategy: 'x' is not one of"),
        ("datasets: [{path: a, format: chat}]", "datasets.0.format: 'chat' is not one of auto"),
        ("moe: {gate: soft_max}", "moe.gate: 'soft_max' is not one of softmax, .*; the nearest is 'softmax'"),
        ("moe: {router: mlp}", "moe.router: 'mlp' is not one of task_table, task_mlp"),
        ("moe: {r: 0}", "moe.r: 0 is out of range; give a number a whole number >= 1"),
        ("moe: {lora_dropout: 1}", r"moe.lora_dropout: 1.0 is out of range; give a number >= 0 and < 1"),
        ("moe: {rank_pattern: {a: 0}}", "moe.rank_pattern.a: 0 is out of range"),
        ("learning_rate: -1", "learning_rate: -1.0 is out of range; give a number >= 0"),
        ("warmup_ratio: 1.5", "warmup_ratio: 1.5 is out of range; give a number between 0 and 1"),
        ("adam_epsilon: 0", "adam_epsilon: 0.0 is out of range; give a number > 0"),
        ("phases: [{router_temperature: [1, 0]}]", "phases.0.router_temperature: 0.0 is out of range"),
        ("task_weights: {a: -1}", "task_weights.a: -1.0 is out of range"),
        ("warmup_steps: 11", "warmup_steps: 11 is more than max_steps, 10"),
        ("model_name_or_path: m", "model: both are set of model_name_or_path and model"),
        ("moe: {gate: top_k}", "moe.top_k: None with gate 'top_k'"),
        ("moe: {gate: top_k, top_k: 9}", "moe.top_k: 9 must be between 2 and num_experts = 8"),
        ("moe: {num_heads: 2}", "moe.num_heads: 2 needs compose: before"),
        ("mixing: {strategy: capped}", "mixing.cap: is missing"),
        ("mixing: {strategy: explicit}", "mixing.weights: is missing"),
        ("task_type: SEQ_2_SEQ_LM\ndata2: 1", "data2: unknown key"),
        ("phases: [{steps: 3}, {steps: 3}]", "phases: their steps add up to 6, but max_steps is 10"),
        ("phases: []", "phases: the list is empty"),
        ("phases: [{adapters: false}]", "phases.0.train: experts, router, task_embedding cannot train while"),
        ("report_to: [wandb, none]", "report_to: 'none' stands beside others"),
        ("deepspeed: nowhere/zero1.json", "deepspeed: cannot read nowhere/zero1.json"),
        ("surgery: {method: pcgard}", "surgery.method: 'pcgard' is not one of .*; the nearest is 'pcgrad'"),
        ("surgery: {method: gradvaq}", "surgery.method: 'gradvaq' is not .*; the nearest is 'gradvac'"),
        ("surgery: {method: pcgrad, options: {c: 1}}", "surgery.options.c: 'pcgrad' has no such option"),
        ("surgery: {method: sum, scope: heads}", "surgery.scope: 'heads' is not one of all, experts"),
        ("surgery: {method: sum, way: fast}", "surgery.way: 'fast' is not one of auto, fused, separate"),
        ("surgery: {method: sum, max_tasks: 0}", "surgery.max_tasks: 0 is out of range"),
        ("surgery: {method: gradvac, refresh_every: 2}", "surgery.refresh_every: 2, but 'gradvac' has no"),
        ("phases: [{gate: top_k}]", "phases.0.gate: moe.top_k: None with gate 'top_k'; set both"),
        ("phases: [{gate: gumble}]", "phases.0.gate: 'gumble' is unknown; known are softmax"),
        ("moe: {router: fixed, gate: raw}\nphases: [{gate: softmax}]", "phases.0.gate: 'softmax' with"),
        ("surgery: {method: graddrop, scope: layer}", "surgery.scope: 'layer' has no effect on 'graddrop'"),
        (
            "surgery: {method: sum, way: fused}\nphases: [{train: [base, experts]}]",
            "surgery.way: 'fused' splits experts and routers, and base trains too; set way to auto",
        ),
    ],
)
def test_values_that_cannot_be_used(write, text: str, message: str) -> None:
    import re

    path = write(BASE + text)
    found = fails(load, path)
    assert re.match(rf"({re.escape(str(path))}:\d+: )?{message.replace('[', chr(92) + '[')}", found), found


def test_model_and_data_are_required(write) -> None:
    assert "model_name_or_path: neither is set" in fails(load, write("data: {skill_gym: {}}"))
    assert "model.type: is missing" in fails(load, write("model: {}\ndata: {skill_gym: {}}"))
    assert "datasets: there are no data" in fails(load, write("model: {type: llama}"))
    message = fails(load, write("model: {type: llama}\ndatasets: [{name: a}]"))
    assert "datasets.0.path: is missing" in message
    load(write("model: {type: llama}\ndata: {root: x}"))


def test_explicit_mixing_through_datasets(write) -> None:
    text = "model: {type: llama}\nmixing: {strategy: explicit}\ndatasets: [{path: a.jsonl, weight: 2%s}]"
    assert load(write(text % ", name: a")).datasets[0].weight == 2.0
    assert "datasets.0.weight: needs datasets.0.name" in fails(load, write(text % ""))


@pytest.mark.parametrize(
    "text, key",
    [
        ("mixing: {strategy: equal, cap: 3}", "mixing.cap"),
        ("mixing: {cap: 3}", "mixing.cap"),
        ("mixing: {temperature: 2}", "mixing.temperature"),  # also at its default
        ("mixing: {strategy: equal, max_epochs: 3}", "mixing.max_epochs"),
        ("mixing: {weights: {a: 1}}", "mixing.weights.a|mixing.weights"),
        ("mixing: {strategy: equal}\nphases: [{mixing: {strategy: proportional}}]", "mixing.strategy"),
        ("phases: [{mixing: {cap: 3}}]", "phases.0.mixing.cap"),
        ("moe: {top_k: 2}", "moe.top_k"),
        ("moe: {router_hidden_dim: 8}", "moe.router_hidden_dim"),
        ("moe: {task_embedding_dim: 8}", "moe.task_embedding_dim"),
        ("moe: {router: task_mlp, router_init_std: 1}", "moe.router_init_std"),
        ("moe: {gate: uniform, router_temperature: 2}", "moe.router_temperature"),
        ("task_embedding_learning_rate: 1", "task_embedding_learning_rate"),
        ("base_learning_rate: 1", "base_learning_rate"),
        ("phases: [{base_learning_rate: 1}]", "phases.0.base_learning_rate"),
        ("phases: [{train: [experts], router_learning_rate: 1}]", "phases.0.router_learning_rate"),
        ("phases: [{restart_schedule: true}]", "phases.0.restart_schedule"),
        ("phases: [{reinit: [experts]}]", "phases.0.reinit"),
        ("phases: [{adapters: false, train: [base], gate: gumbel}]", "phases.0.gate"),
        ("phases: [{gate: raw, router_temperature: [2, 1]}]", "phases.0.router_temperature"),
        (
            "phases: [{router_temperature_schedule: exponential}]",
            "phases.0.router_temperature_schedule",
        ),
        ("moe: {router: random_tasks, gate: raw}\nrouter_learning_rate: 1", "router_learning_rate"),
        ("moe: {router: fixed, gate: raw, router_temperature: 2}", "moe.router_temperature"),
        (f"moe: {{{L2}, router_temperature: 2}}", "moe.router_temperature"),
        (f"moe: {{{L2}}}\nphases: [{{router_temperature: [2, 1]}}]", "phases.0.router_temperature"),
        (
            "moe: {router: fixed, gate: raw}\nphases: [{router_temperature: [2, 1]}]",
            "phases.0.router_temperature",
        ),
        ("moe: {router: fixed, gate: raw}\nsurgery: {method: sum, scope: routers}", "surgery.scope"),
        (
            "phases: [{adapters: false, train: [base], router_temperature: [1, 1]}]",
            "phases.0.router_temperature",
        ),
        ("pooling: mean", "pooling"),
        ("trust_remote_code: true", "trust_remote_code"),
        ("gradient_checkpointing_reentrant: true", "gradient_checkpointing_reentrant"),
        ("optim: sgd\nadam_beta1: 0.8", "adam_beta1"),
        ("warmup_steps: 3\nwarmup_ratio: 0.03", "warmup_ratio"),
        ("report_to: []\ntrack: {wandb_project: x}", "track.wandb_project"),
        ("early_stopping_patience: 3", "early_stopping_patience"),
        ("datasets: [{path: a, name: a, weight: 2}]", "datasets.0.weight"),
        ("surgery: {scope: experts}", "surgery.scope"),
        ("surgery: {options: {reduction: mean}}", "surgery.options"),
        ("surgery: {method: sum, scope: routers}", "surgery.scope"),  # rows of a table are each one task's
        ("surgery: {method: sum, scope: experts}\nphases: [{train: [router]}]", "surgery.scope"),
    ],
)
def test_keys_without_effect(write, text: str, key: str) -> None:
    message = fails(load, write(BASE + text))
    assert any(f": {k}: has no effect: " in message for k in key.split("|")), message
    assert "null" in message


def test_what_one_option_makes_idle_another_gate_of_a_phase_may_read(write) -> None:
    text = BASE + f"moe: {{{L2}}}\nphases: [{{gate: sigmoid, router_temperature: [2, 1]}}]"
    assert load(write(text)).phases[0].router_temperature == (2.0, 1.0)


@pytest.mark.parametrize(
    "text, key",
    [
        ("model_name_or_path: m\ntokenizer: {kind: char}\ndata: {root: x}", "tokenizer.kind"),
        ("model: {type: t}\ndata: {root: x, max_target_length: 3}", "data.max_target_length"),
        (
            "model: {type: t}\ndata: {root: x, packing: true, group_by_length_window: 2}",
            "data.group_by_length_window",
        ),
        (
            "model: {type: t}\ntask_type: SEQ_CLS\ndata: {root: x}\nevaluation: {num_beams: 2}",
            "evaluation.num_beams",
        ),
        (
            "model: {type: t}\nmixing: {strategy: explicit, weights: {a: 1}}\n"
            "datasets: [{path: x, name: a, weight: 1}]",
            "datasets.0.weight",
        ),
        ("model: {type: t}\ndata: {skill_gym: {conflict: 0.5}}", "data.skill_gym.conflict"),
    ],
)
def test_more_keys_without_effect(write, text: str, key: str) -> None:
    assert f": {key}: has no effect: " in fails(load, write(text))


def test_a_config_made_in_python_is_checked_against_its_defaults() -> None:
    good = Config(model={"type": "llama"}, data=DataConfig(skill_gym=SkillGymConfig()))
    validate(good)
    bad = dataclasses.replace(good, mixing=MixingConfig(strategy="equal", cap=3))
    assert fails(validate, bad).startswith("mixing.cap: has no effect: mixing.strategy is 'equal'")
    assert "learning_rate: nan is out" in fails(
        validate, dataclasses.replace(good, learning_rate=float("nan"))
    )


def test_a_deepspeed_file_is_found_beside_the_yaml(write, tmp_path: Path) -> None:
    write("{}", "zero.json")
    path = write(BASE + "deepspeed: zero.json")
    assert load(path).deepspeed == str(tmp_path / "zero.json")
    write('{"fp16": {"enabled": true}}', "zero.json")
    assert "fp16: this section is not used here" in fails(load, path)


def test_tables_of_checks_name_real_keys() -> None:
    known = known_paths()
    for path in (*CHOICES, *RANGES):
        assert path in known or path.removesuffix(".*") in known, path
    everything = Config(
        optim="sgd",
        warmup_steps=1,
        report_to=(),
        model_name_or_path="m",
        task_type="SEQ_CLS",
        datasets=(DatasetConfig(),),
        data=DataConfig(packing=True),
        moe=TaskMoEConfig(router="none", gate="uniform"),
        mixing=MixingConfig(strategy="equal"),
        phases=(PhaseConfig(train=(), adapters=False, mixing=MixingConfig(strategy="equal")),),
    )
    sections = {path.rsplit(".", 1)[0] for path in known if "." in path}
    for path in ineffective(everything):
        pattern = path.replace(".0", ".*")
        assert pattern in known or pattern in sections, path


# -- the way back ----------------------------------------------------------------------------------------

RICH = Config(
    model={"type": "llama", "hidden_size": 32, "rms_norm_eps": 1e-5, "bos_token_id": None, "list": [1, 2]},
    tokenizer=TokenizerConfig(kind="char"),
    moe=TaskMoEConfig(
        compose="before",
        num_heads=2,
        lora_alpha=3.0,
        target_modules=("q", "v"),
        layers_to_transform=(0, 1),
        rank_pattern={"mlp.up": 2, "1": 3},
        gate="top_k",
        top_k=2,
    ),
    datasets=(
        DatasetConfig(
            name="no", path="a.jsonl", labels=("no", "1e-3", "null", "0"), template="{{ a }}:\n{{ b }}"
        ),
        DatasetConfig(name="b", path="b.csv", weight=0.5),
    ),
    mixing=MixingConfig(strategy="explicit"),
    data=DataConfig(skill_gym=SkillGymConfig(num_tasks=3), max_length=7),
    phases=(
        PhaseConfig(
            name="a",
            steps=3,
            train=("base",),
            adapters=False,
            mixing=MixingConfig(strategy="temperature", cap=3),
            base_learning_rate=1e-4,
        ),
        PhaseConfig(name="b", router_temperature=(2.0, 0.5), restart_schedule=True),
    ),
    task_weights={"b": 2.0},
    warmup_steps=2,
    max_steps=9,
    evaluation=EvaluationConfig(metrics={"a*": "macro_f1"}, groups={"g": "a*"}),
    resume_from_checkpoint="true",
    run_name="007",
    learning_rate=1e-5,
    surgery=SurgeryConfig(method="pcgrad", options={"reduction": "mean"}, scope="layer", max_tasks=3),
    track=TrackConfig(wandb_entity="x"),
)


@pytest.mark.parametrize(
    "config",
    [
        RICH,
        Config(model={"type": "t5"}, data=DataConfig(skill_gym=SkillGymConfig())),
        Config(
            model_name_or_path="m",
            task_type="SEQ_CLS",
            pooling="mean",
            data=DataConfig(root="x"),
            optim="sgd",
        ),
    ],
    ids=["rich", "defaults", "classification"],
)
def test_round_trip(write, config: Config) -> None:
    validate(config)
    text = dump(config)
    again = load(write(text))
    assert again == config
    assert dump(again) == text


def test_dump_shows_what_takes_effect(settings) -> None:
    text = dump(settings("mixing: {strategy: equal}\n"))
    assert "max_length: 256" in text and "learning_rate: 0.001" in text
    assert "max_epochs" not in text and "router_hidden_dim" not in text


# -- schema ----------------------------------------------------------------------------------------------


def test_schema_has_every_key_with_type_default_and_description() -> None:
    built = schema()

    def at(path: str) -> dict[str, Any]:
        node = built
        for part in path.split("."):
            node = node["items"] if part == "*" else node["properties"][part]
        return node

    for path in known_paths():
        entry = at(path)
        assert "type" in entry or "anyOf" in entry, path
        assert "default" in entry, path
    assert at("moe.r") == {
        "type": "integer",
        "minimum": 1,
        "default": 4,
        "description": "rank of one expert; rank-1 experts are r = 1",
        "x-read-by": [f"{seam}: {name}" for seam, name in readers_of("r")],
    }
    assert at("warmup_ratio") == {"type": "number", "minimum": 0, "maximum": 1, "default": 0.03}
    assert at("max_grad_norm")["description"] == "0: no clipping"
    assert at("moe.gate")["enum"] and at("mixing.strategy")["enum"][0] == "proportional"
    assert at("moe.n_skills")["description"] == "another name of num_experts"
    assert at("phases.*.train")["items"]["enum"][0] == "base"
    assert at("phases.*.router_temperature")["minItems"] == 2
    assert at("task_weights")["additionalProperties"] == {"type": "number", "minimum": 0}
    assert built["additionalProperties"] is False


def test_schema_describes_what_the_loader_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    validator = jsonschema.Draft202012Validator(schema())
    assert not list(validator.iter_errors(yaml.safe_load(dump(RICH))))
    assert list(validator.iter_errors({"learning_rat": 1}))


def test_schema_says_which_choice_reads_which_key() -> None:
    moe = schema()["properties"]["moe"]
    for key, entry in moe["properties"].items():
        readers = [f"{seam}: {name}" for seam, name in readers_of(ALIASES.get(key, key))]
        assert readers or key in GENERAL or key.endswith("_options"), f"nothing reads {key}"
        assert key in GENERAL or entry.get("x-read-by", []) == readers, key
    assert moe["properties"]["top_k"]["x-read-by"] == ["gate: top_k"]
    phase = schema()["properties"]["phases"]["items"]["properties"]
    assert phase["gate"]["enum"] == [*SEAMS["gate"], None]
    assert phase["reinit"]["items"]["enum"] == list(REINIT)
    rules = {(seam, rule["if"]["properties"][seam]["const"]): rule["then"]
             for rule in moe["allOf"] for seam in rule["if"]["properties"]}  # fmt: skip
    for seam, methods in SEAMS.items():
        for name, method in methods.items():
            options = rules[seam, name]["properties"][f"{seam}_options"]
            assert options["properties"].keys() == default_options(method).keys()
            for option, entry in options["properties"].items():
                assert entry.get("description"), f"{seam} {name}: option {option} has no comment on its line"


def test_schema_refuses_an_option_of_another_choice() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    for seam, methods in SEAMS.items():
        for name in methods:
            assert list(validator.iter_errors({"moe": {seam: name, f"{seam}_options": {"nobody": 1}}}))
            assert not list(validator.iter_errors({"moe": {seam: name}}))


def test_an_option_that_the_choice_does_not_have(write) -> None:
    message = fails(load, write(BASE + "moe: {router_options: {depth: 2}}"))
    assert "moe.router_options" in message and ("has no effect" in message or "unknown option" in message)


def test_comments_of_fields() -> None:
    from taskmoe.train import config as module

    comments = field_comments(module)
    assert comments["MixingConfig", "max_epochs"] == "strategy: unimax"
    assert ("Config", "seed") not in comments


def test_files_lie_beside_the_yaml(tmp_path: Path, write) -> None:
    (tmp_path / "vectors.json").write_text('{"a": [1.0, 2.0]}')
    moe = "moe: {router: task_mlp, representation: frozen, representation_options: {path: vectors.json}}"
    options = load(write(BASE + moe)).moe.representation_options
    assert options == {"path": str(tmp_path / "vectors.json")}


def test_heads_that_the_router_gives_one_routing(write) -> None:
    text = "moe: {compose: before, num_heads: 8, router: none, gate: uniform}"
    assert "moe.num_heads: has no effect: " in fails(load, write(BASE + text))


def test_a_scope_that_the_router_ignores(write) -> None:
    message = fails(load, write(BASE + "moe: {router: none, gate: uniform, router_scope: layer}"))
    assert "moe.router_scope: has no effect: " in message
