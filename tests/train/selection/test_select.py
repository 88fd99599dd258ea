"""taskmoe select, from the command line: of a file of settings and of a run."""

from __future__ import annotations

import json
import shutil

import pytest

from taskmoe.train.cli import main
from taskmoe.train.config_io import load
from taskmoe.train.loop import train

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


def test_a_run_of_classifiers_and_what_its_tasks_share(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    model = "bert, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2"
    path.write_text(
        f"model: {{type: {model}}}\ntask_type: SEQ_CLS\nmoe: {{r: 2, num_experts: 2}}\nmax_steps: 2\n"
        f"save_steps: 1\nsave_total_limit: 2\ntokenizer: {{kind: char, vocab_size: 64}}\nreport_to: []\n"
        f"data: {{root: {tmp_path}/data, cache_dir: {tmp_path}/cache, max_length: 16}}\n"
        f"output_dir: {tmp_path}/run\nmixing: {{strategy: equal}}\nper_device_train_batch_size: 4\n"
    )
    for task, labels in {
        "irony": ("no", "yes"),
        "mood": ("bad", "good", "ok"),
        "tone": ("no", "yes"),
    }.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        rows = [{"text": f"{c} {task}", "label": labels[i % len(labels)]} for i, c in enumerate("abcdef")]
        for split in ("train", "validation"):
            (tmp_path / "data" / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train(load(path)) == 0
    argv = ["select", f"{tmp_path}/run", "--method", "textemb,taskemb,gradient,datamap", "--json"]
    assert main([*argv, "--target", "mood", "--group", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for method in ("textemb", "taskemb", "gradient", "datamap"):
        rows = found["rankings"][method]["mood"]
        assert {row["task"] for row in rows} == {"irony", "tone"}
        assert all(row["affinity"] is not None for row in rows)
        assert sorted(found["groups"][method]["label"]) == ["irony", "mood", "tone"]


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
