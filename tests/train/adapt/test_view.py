"""What taskmoe adapt takes and prints."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from scipy import stats

from taskmoe.moe import ConfigError
from taskmoe.train.adapt.settings import AdaptSettings, read_settings
from taskmoe.train.adapt.study import Score, Study
from taskmoe.train.adapt.view import summary
from taskmoe.train.cli import main
from taskmoe.train.commands.adapt import SETTINGS

VALUES = {  # mode, seed -> scores of two tasks
    ("router", 0): (0.5, 0.0), ("router", 1): (0.7, 0.2), ("router", 2): (0.9, 0.1),
    ("new_lora", 0): (0.4, 0.0), ("new_lora", 1): (0.4, 0.0), ("new_lora", 2): (0.4, 0.0),
}  # fmt: skip


def study() -> Study:
    scores = [
        Score(mode, 16, seed, task, "exact_match", value, 1.0, 10, 20, 0.5, None, 7)
        for (mode, seed), values in VALUES.items()
        for task, value in zip("ab", values, strict=True)
    ]
    return Study("run", "test", ["a", "b"], scores)


def test_means_and_intervals_over_seeds():
    router, lora = summary(study(), "new_lora")
    means = [0.25, 0.45, 0.5]
    interval = stats.t.interval(0.95, 2, sum(means) / 3, stats.sem(means))
    assert router["score"]["value"] == pytest.approx(0.4)
    assert (router["score"]["low"], router["score"]["high"]) == pytest.approx(interval)
    assert router["tasks"] == pytest.approx({"a": 0.7, "b": 0.1})
    assert router["difference"]["value"] == pytest.approx(0.2)
    assert router["relative_gain"]["value"] == pytest.approx(0.75), "task b is zero in the baseline"
    assert router["relative_gain"]["left_out"] == ["b"]
    assert lora["difference"] is None and lora["score"]["low"] == pytest.approx(0.2)
    assert [line["difference"] for line in summary(study(), None)] == [None, None]


def test_each_key_is_an_option():
    assert {"datasets", *SETTINGS} == set(AdaptSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("max_steps: 3", {}, "no data; set datasets, root or skill_gym_unseen"),
        ("root: x\nmax_step: 3", {}, "max_step: unknown key"),
        (
            "root: x",
            {"validation": "1.0"},
            "--validation: validation: 1.0 must be at least 0 and less than 1",
        ),
        ("root: x\nmax_steps: 0", {}, "max_steps: 0 must be at least 1"),
        ("root: x", {"learning_rate": "fast"}, "expected a number, found 'fast'"),
        ("root: x", {"learning_rate": "0"}, "--learning_rate: learning_rate: 0.0 must be more than 0"),
        ("root: x\nrouter_learning_rate: -1", {}, "router_learning_rate: -1.0 must be more than 0"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, text, given, message):
    path = tmp_path / "new.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path, given)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file; give a YAML file with datasets"):
        read_settings(tmp_path / "no.yaml", {})


def test_the_command(run, new_tasks, tmp_path, capsys):
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump({"datasets": [{"name": d.name, "path": d.path} for d in new_tasks]}))
    given = ["adapt", str(run), str(path), "--mode", "nearest,zero", "--shots", "4", "--baseline", "zero"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["mode"] for line in found["summary"]] == ["nearest", "zero"]
    assert found["summary"][0]["difference"]["value"] == pytest.approx(
        found["summary"][0]["score"]["value"] - found["summary"][1]["score"]["value"]
    )
    assert {s["start"] for s in found["scores"]} == {"berry", "apple", None}
    assert main([*given, "--seeds", "0,1"]) == 0
    shown = capsys.readouterr().out
    assert "citrus" in shown and "minus zero" in shown and "95 % interval" in shown


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "--mode is missing"),
        (["--mode", "rooter"], "'rooter' is not one of router, router[+]experts"),
        (["--mode", "router", "--shots", "0"], "--shots: '0' is not a list of whole numbers"),
        (["--mode", "router", "--seeds", "a"], "--seeds: 'a' is not a list"),
        (["--mode", "router", "--baseline", "zero"], "'zero' is not among the modes router"),
        (["--mode", "router", "--speed", "3"], "unexpected argument '--speed'"),
        (["--mode", "router"], "run: no such run folder|no such file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, tokens, message):
    assert main(["adapt", str(tmp_path / "run"), str(tmp_path / "new.yaml"), *tokens]) == 2
    assert re.search(message, capsys.readouterr().err)
