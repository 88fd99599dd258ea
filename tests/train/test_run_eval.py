from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taskmoe.moe import ConfigError, TaskError, TaskMoEConfig
from taskmoe.moe.state import read_config
from taskmoe.train.checkpoint import CheckpointError
from taskmoe.train.cli import main
from taskmoe.train.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    TokenizerConfig,
)
from taskmoe.train.loop import train
from taskmoe.train.run_eval import score_run
from taskmoe.train.track.log import read_log

LLAMA = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT = LLAMA | {"type": "bert", "max_position_embeddings": 32}
COMMON: dict[str, Any] = {
    "moe": TaskMoEConfig(r=2, num_experts=2),
    "mixing": MixingConfig(strategy="equal"),
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "report_to": (),
}


def write_tasks(root: Path, names: dict[str, tuple[str, ...]], splits: tuple[str, ...]) -> Path:
    for name, labels in names.items():
        (root / name).mkdir(parents=True)
        for split in splits:
            rows = [
                {"text": f"{letter} {name}", "label": labels[i % len(labels)]}
                for i, letter in enumerate("abcdef")
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{split}.jsonl").write_text(text)
    return root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two classification tasks."""
    folder = tmp_path_factory.mktemp("classifier")
    root = write_tasks(
        folder / "data", {"irony": ("no", "yes"), "mood": ("bad", "ok", "good")}, ("train", "validation")
    )
    config = Config(
        model=BERT,
        task_type="SEQ_CLS",
        tokenizer=TokenizerConfig("char", 64),
        data=DataConfig(root=str(root), max_length=24, cache_dir=str(folder / "cache")),
        evaluation=EvaluationConfig(metrics={"irony": "f1:yes", "*": "macro_f1"}, max_rows=3),
        output_dir=str(folder / "run"),
        **COMMON,
    )
    assert train(config) == 0
    return folder / "run"


def test_same_numbers_as_the_end_of_training(tmp_path: Path) -> None:
    gym = SkillGymConfig(num_tasks=3, num_skills=3, train_rows=16, validation_rows=5, test_rows=4)
    config = Config(
        model=LLAMA,
        tokenizer=TokenizerConfig("char", 64),
        data=DataConfig(skill_gym=gym, max_length=48, cache_dir=str(tmp_path / "cache")),
        evaluation=EvaluationConfig(max_new_tokens=4),
        output_dir=str(tmp_path / "run"),
        **(COMMON | {"learning_rate": 0.5}),
    )
    assert train(config) == 0
    at_the_end = json.loads((tmp_path / "run" / "eval_results.json").read_text())["experts"]
    _, found = score_run(tmp_path / "run")
    assert {key: found[key] for key in at_the_end} == at_the_end
    assert (found["checkpoint"], found["step"], found["split"]) == ("checkpoint-2", 2, "validation")
    _, tested = score_run(tmp_path / "run" / "checkpoint-2", split="test", return_predictions=True)
    assert [scores["rows"] for scores in tested["tasks"].values()] == [4, 4, 4]
    assert all(len(texts) == 4 for texts in tested["predictions"].values())


def test_the_gate_and_temperature_of_the_phase_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    gym = SkillGymConfig(num_tasks=3, num_skills=3, train_rows=16, validation_rows=5, test_rows=4)
    every = ("experts", "router")
    first = PhaseConfig("first", 2, train=every, gate="one_hot", router_temperature=(5.0, 4.0))
    second = PhaseConfig("second", 2, train=every, router_temperature=(0.3, 0.2))
    config = Config(
        model=LLAMA,
        tokenizer=TokenizerConfig("char", 64),
        data=DataConfig(skill_gym=gym, max_length=48, cache_dir=str(tmp_path / "cache")),
        evaluation=EvaluationConfig(max_new_tokens=4),
        output_dir=str(tmp_path / "run"),
        phases=[first, second],
        **(COMMON | {"learning_rate": 0.1, "max_steps": 4, "eval_steps": 2, "save_steps": 2}),
    )
    assert train(config) == 0
    run = tmp_path / "run"
    saved = [read_config(run / f"checkpoint-{step}") for step in (2, 4)]
    assert [(c.gate, c.router_temperature) for c in saved] == [("one_hot", 4.0), ("softmax", 0.2)]
    at_the_end = json.loads((run / "eval_results.json").read_text())["experts"]
    _, found = score_run(run)
    assert {key: found[key] for key in at_the_end} == at_the_end
    losses = {step: score_run(run / f"checkpoint-{step}")[1]["macro"]["loss"] for step in (2, 4)}
    logged = [line for line in read_log(run / "trainer_log.jsonl") if line["kind"] == "eval"]
    assert losses == {line["step"]: line["eval/macro/loss"] for line in logged}
    _, warmer = score_run(run, ["--moe.router_temperature=5"])
    assert warmer["macro"]["loss"] != losses[4], "a setting on the command line counts"
    _, other = score_run(run / "checkpoint-2", ["--moe.gate", "softmax"])
    assert other["macro"]["loss"] != losses[2]
    # A resumed run gates as its own phase says, not as the checkpoint.
    shutil.rmtree(run / "checkpoint-4")
    assert train(replace(config, resume_from_checkpoint="true")) == 0
    assert json.loads((run / "eval_results.json").read_text())["experts"] == at_the_end


def test_json_is_one_object_on_stdout_and_all_rows_are_scored(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(classifier), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert {name: (scores["metric"], scores["rows"]) for name, scores in found["tasks"].items()} == {
        "irony": ("f1:yes", 6),
        "mood": ("macro_f1", 6),
    }
    assert found["score"] == pytest.approx(
        (found["tasks"]["irony"]["f1:yes"] + found["tasks"]["mood"]["macro_f1"]) / 2
    )
    assert found["split"] == "validation" and found["step"] == 2


def test_folders_that_were_not_there_at_training(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tasks(tmp_path / "other", {"mood": ("good",)}, ("test",))  # a subset of tasks and of labels
    assert main(["eval", str(classifier), "--data.root", str(other), "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["tasks"]) == ["mood"] and found["tasks"]["mood"]["rows"] == 6
    assert found["data_root"] == str(other) and found["split"] == "test"


def test_a_table_for_people(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(classifier), "--evaluation.max_rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "irony" in out and "macro_f1" in out and "score" in out and "│    2 │" in out


def test_beside_a_baseline(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", str(classifier), "--baseline", str(classifier / "checkpoint-2"), "--split", "train"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    baseline, compared = found.pop("baseline"), found.pop("against")
    assert baseline == found and found["split"] == "train"
    assert [arm["wins"] for arm in compared["arms"]] == [None, {"better": 0, "same": 2, "worse": 0}]
    values = [task["arms"][0]["mean"] for task in compared["tasks"]]
    assert values == [found["tasks"]["irony"]["f1:yes"], found["tasks"]["mood"]["macro_f1"]]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "score" in out and "relative gain" in out and "0/2/0" in out


def test_unknown_tasks_name_the_nearest(classifier: Path, tmp_path: Path) -> None:
    other = write_tasks(tmp_path / "other", {"ironie": ("no", "yes")}, ("test",))
    with pytest.raises(TaskError, match=r"unknown task 'ironie'.*irony"):
        score_run(classifier, [f"--data.root={other}"], "test")


def test_a_split_that_is_not_there(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(classifier), "--split", "test", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "test" in captured.err.splitlines()[-1] and "Traceback" not in captured.err


def test_folders_that_are_no_runs(tmp_path: Path, classifier: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        score_run(tmp_path)
    (tmp_path / "config.yaml").write_text((classifier / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="no checkpoint-N in") as caught:
        score_run(tmp_path)
    assert "resume_from_checkpoint" not in str(caught.value)


def test_settings_of_another_model_do_not_fit(classifier: Path) -> None:
    with pytest.raises(ValueError, match="other settings"):
        score_run(classifier, ["--moe.r=3"])
