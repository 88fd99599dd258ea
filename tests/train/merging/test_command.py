"""Command lines of ``taskmoe merge`` that are refused before anything is read."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from taskmoe.moe.merging.kinds import MERGERS
from taskmoe.train.cli import main
from taskmoe.train.commands.merge import USAGE, _numbers, _options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "merge: SOURCE is missing"),
        (["x"], "merge: --method is missing"),
        (["x", "--method", "ties"], "merge: --out is missing"),
        (
            ["x", "--method", "ties", "--out", "y", "--format", "pefd"],
            "--format: 'pefd' is not one of peft, run",
        ),
        (
            ["x", "--method", "ties", "--out", "y", "--over", "task"],
            "--over: 'task' is not one of tasks, experts",
        ),
        (["x", "--method", "ties", "--out", "y", "--max_rank", "0"], "--max_rank: '0' is not a whole number"),
        (
            ["x", "--method", "ties", "--out", "y", "--coefficient", "1,nan"],
            "--coefficient: '1,nan' is not a",
        ),
        (
            ["x", "--method", "ties", "--out", "y", "--options", "density"],
            "--options: 'density' is not KEY=VALUE",
        ),
        (["x", "--method", "ties", "--out", "y", "--density", "1"], "merge: unexpected argument '--density'"),
        (["x", "--method", "ties", "--out", "y"], "x: no such folder"),
    ],
)
def test_refused(words, message, capfd, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *words]) == 2
    assert message in capfd.readouterr().err


def test_the_help_names_the_methods_their_options_and_defaults() -> None:
    """It is written by hand: nothing heavy is imported for it."""
    (told,) = re.findall(r"default: 1, (.*?)\. Of several", " ".join(USAGE.split()))
    of: dict[str, float] = {}
    for names, value in re.findall(r"of ([a-z_ ]+) (\d[\d.]*)", told):
        of |= dict.fromkeys(names.split(" and "), float(value))
    assert of == {n: m.coefficient for n, m in MERGERS.items() if m.coefficient != 1}
    for name, method in MERGERS.items():
        (line,) = re.findall(rf"^ +{name}  .*", USAGE, re.MULTILINE)
        options = {field.name for field in fields(method.Options)} - {"space"}  # said above the methods
        assert set(re.findall(r"\w+", line.partition("options:")[2])) == options, name


def test_lists_and_options() -> None:
    assert _numbers("0.5, 1") == [0.5, 1.0] and _numbers(None) == []
    assert _options("weights=[0.7,0.3],scope=row") == {"weights": [0.7, 0.3], "scope": "row"}
    assert _options(None) == {}
