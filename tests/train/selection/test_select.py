"""taskmoe select, from the command line: of a file of settings and of a run."""

from __future__ import annotations

import json
import shutil

import pytest

from taskmoe.train.cli import main

NAMES = ["blue-a", "blue-b", "green-a", "green-b", "red-a", "red-b"]


def twin(name: str) -> str:
    return name[:-1] + ("b" if name.endswith("a") else "a")


@pytest.fixture
def transfer(tmp_path):
    """A measured matrix in which a twin is worth most, and blue the rest."""
    rows = {
        target: {s: 0.9 if s == twin(target) else 0.5 if "blue" in s else 0.3 for s in NAMES if s != target}
        for target in NAMES
    }
    path = tmp_path / "transfer.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_file_of_settings_ranked_scored_and_grouped(config_file, transfer, capsys):
    argv = ["select", str(config_file), "--method", "semb,gradient,size", "--rows", "4"]
    assert main([*argv, "--target", "all", "--matrix", transfer, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["tasks"] == NAMES and list(found["rankings"]) == ["semb", "gradient", "size"]
    for target in NAMES:
        assert found["rankings"]["semb"][target][0]["task"] == twin(target)
        assert found["rankings"]["gradient"][target][0]["task"] == twin(target)
    assert found["scores"]["semb"]["regret@1"] == 0 and found["scores"]["semb"]["targets"] == 6
    assert found["scores"]["size"]["regret@1"] > 0
    assert found["scores"]["size"]["ndcg"] < found["scores"]["semb"]["ndcg"] <= 1


def test_tables_for_one_target_and_groups_of_a_run_whose_data_are_gone(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    argv = ["select", str(moved), "--method", "routing,random", "--target", "red-a"]
    assert main([*argv, f"--data.root={tmp_path}/nowhere"]) == 0
    out = capsys.readouterr().out
    assert "for red-a: sources" in out and "routing" in out and all(n in out for n in NAMES if n != "red-a")
    grouped = ["select", str(moved), "--method", "routing", "--group", "2", "--json"]
    assert main([*grouped, f"--data.root={tmp_path}/nowhere"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]["routing"]
    assert sorted(groups["label"]) == NAMES and set(groups["label"].values()) == {0, 1}
    assert all(abs(sum(row) - 1) < 1e-9 for row in groups["membership"].values())


def test_data_maps_need_several_checkpoints(run, tmp_path, capsys):
    argv = ["--method", "datamap", "--group", "3", "--rows", "4", "--json"]
    assert main(["select", str(run), *argv]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]["datamap"]
    assert sorted(groups["label"]) == NAMES and len(set(groups["label"].values())) == 3
    one = tmp_path / "one"
    shutil.copytree(run, one, ignore=shutil.ignore_patterns("checkpoint-2", "checkpoint-4"))
    assert main(["select", str(one), *argv]) == 2
    assert "has 1 checkpoint, and data maps need" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--target red-a", "select: --method is missing"),
        ("--method semb", "give --target TASK to rank its sources, --group K to group tasks, or both"),
        ("--method semb --target red-c", "unknown task 'red-c'; the nearest of 6 are red-b, red-a"),
        ("--method sem --target red-a", "--method: 'sem' is not one of semb, textemb,"),
        (
            "--method divergence --measure md --target red-a",
            "--measure: 'md' is not one of mmd, wasserstein,",
        ),
        (
            "--method semb --measure kl --target red-a",
            "--measure: semb does not read it; leave it out, or use",
        ),
        ("--method size --rows 3 --target red-a", "--rows: size does not read it"),
        ("--method size --group 2", "--group: size says nothing of pairs that holds both ways; use semb"),
        ("--method semb --group 0", "--group: '0' is not a whole number, at least 1"),
        ("--method semb --group 7", "--group: 7 groups of 6 tasks"),
        ("--method semb --group 2 --matrix x.json", "--matrix: it scores rankings; give --target"),
        ("--method semb --target red-a --matrix no.json", "--matrix: no.json is no readable JSON file"),
        (
            "--method routing --target red-a",
            "--method routing: it reads what a run has learned; give a run's",
        ),
        ("--method datamap --target red-a", "--method datamap: it reads what a run has learned"),
        ("--method semb --target red-a --encoder none", "--encoder: 'none' is not hashed_words"),
    ],
)
def test_what_cannot_be_done_says_why(argv, says, config_file, capsys):
    assert main(["select", str(config_file), *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.splitlines()[-1].startswith("taskmoe: error: ")


def test_neither_a_run_nor_a_file(config_file, capsys):
    assert main(["select", str(config_file.parent / "data"), "--method", "size", "--group", "2"]) == 2
    assert main(["select", str(config_file.parent / "rum"), "--method", "size", "--target", "all"]) == 2
    assert "rum: no such run folder or file" in capsys.readouterr().err
