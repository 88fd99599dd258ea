"""Settings from a command line."""

from __future__ import annotations

import dataclasses

import pytest

from taskmoe.train import config_overrides
from taskmoe.train.config import DatasetConfig, MixingConfig
from taskmoe.train.config_decode import leaves
from taskmoe.train.config_io import load


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


def test_overrides_of_lists(write, fails) -> None:
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
        (["--seed", "x"], "--seed: expected a whole number, found 'x'"),
        (["--seed", "[1"], "--seed:1: not YAML"),
        (["--max_length", "0"], "--max_length: data.max_length: 0 is out of range"),
        (["--data", "3", "--data.max_length", "3"], "--data: expected a section, found 3"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_overrides_that_cannot_be_used(settings, fails, tokens: list[str], message: str) -> None:
    assert fails(settings, "", *tokens).startswith(message)


def test_what_a_mapping_on_the_command_line_holds_was_set(settings, fails) -> None:
    message = fails(settings, "", "--mixing", "{strategy: equal, cap: 3}")
    assert message.startswith("--mixing: mixing.cap: has no effect: ")
    assert "phases.0.gate: has no effect: " in fails(
        settings, "", "--phases", "[{adapters: false, train: [base], gate: gumbel}]"
    )


@pytest.mark.parametrize("alias_first", [True, False])
def test_a_key_given_by_both_its_names(settings, fails, alias_first: bool) -> None:
    given = [["--moe.n_skills", "3"], ["--moe.num_experts", "2"]][:: 1 if alias_first else -1]
    message = fails(settings, "", *given[0], *given[1])
    first, second = (" ".join(pair) for pair in given)
    assert message == f"{given[1][0]}: moe.num_experts is given twice, as {first} and {second}; keep one"
    assert settings("", "--n_skills", "3", "--moe.n_skills", "4").moe.num_experts == 4  # one name, the last


def test_an_ambiguous_short_name_lists_the_full_ones(fails, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_null_takes_back_what_the_file_says(settings, fails) -> None:
    text = "mixing: {max_epochs: 2}\n"
    assert settings(text).mixing.max_epochs == 2.0
    assert "mixing.max_epochs: has no effect" in fails(settings, text, "--mixing.strategy", "equal")
    got = settings(text, "--mixing.strategy", "equal", "--mixing.max_epochs", "null")
    assert got.mixing == MixingConfig(strategy="equal")
