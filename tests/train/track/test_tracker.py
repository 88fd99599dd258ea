from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config, TrackConfig
from taskmoe.train.track.log import read_log
from taskmoe.train.track.tracker import Tracker, flatten, is_time, task_of

TASKS = TaskTable.from_names(["sum", "loss", "macro-f1"])


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def tracker(run_dir: Path, state: dict[str, Any] | None = None, **options: Any) -> Tracker:
    config = options.pop("config", Config(max_steps=20, report_to=()))
    options = {"stream": io.StringIO(), "clock": Clock(options.pop("now", 0.0))} | options
    return Tracker(config, run_dir, options.pop("ranks", 0), TASKS, state, **options)


def measured(step: int) -> dict[str, float]:
    return {
        "train/loss": 2.0 / step,
        "train/loss/sum": 1.0 / step,
        "train/loss/loss": 3.0 / step,
        "train/tokens/loss": 10.0 * step,
        "learning_rate/experts": 1e-3,
        "train/tokens_per_second": 123.0 * step,
    }


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_log(path / "trainer_log.jsonl")]


def test_the_log_has_every_metric_and_keeps_the_clock_apart(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    track.log_train(1, measured(1))
    track.log_eval(
        1, {"sum": {"exact_match": 0.5}, "macro": {"exact_match": 0.25}, "eval/score": 0.25, "seconds": 3.0}
    )
    track.close()
    train, evaluation, end = read_log(tmp_path / "trainer_log.jsonl")
    assert train["train/loss/loss"] == 3.0 and train["learning_rate/experts"] == 1e-3
    assert set(train["time"]) == {"train/tokens_per_second", "seconds"}
    assert evaluation["eval/sum/exact_match"] == 0.5 and evaluation["eval/score"] == 0.25
    assert evaluation["kind"] == "eval" and set(evaluation["time"]) == {"eval/seconds", "seconds"}
    assert (end["kind"], end["status"], end["step"]) == ("end", "finished", 1)


def test_a_resumed_run_writes_the_log_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    track = tracker(whole)
    for step in (1, 2, 3, 4):
        track.log_train(step, measured(step))
    track.close()

    track = tracker(broken)
    for step in (1, 2):
        track.log_train(step, measured(step))
    state = json.loads(json.dumps(track.state_dict()))
    track.log_train(3, measured(3))
    track.close("interrupted")
    again = tracker(broken, state, now=1000.0)
    for step in (3, 4):
        again.log_train(step, measured(step))
    again.close()

    assert without_time(broken) == without_time(whole)
    seconds = [line["time"]["seconds"] for line in read_log(broken / "trainer_log.jsonl")]
    assert seconds == sorted(seconds) and seconds[-1] < 100  # the clock goes on from where it was


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track = Tracker(Config(), tmp_path / "run", SimpleNamespace(rank=1), TASKS, None)
    track.log_train(1, measured(1))
    track.log_eval(1, {"score": 1.0})
    track.line("hello")
    assert track.state_dict() == {}
    track.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_what_a_person_reads(tmp_path: Path) -> None:
    stream = io.StringIO()
    track = tracker(tmp_path, stream=stream, ranks=SimpleNamespace(rank=0))
    track.log_train(10, measured(10))
    track.log_eval(10, {"sum/f1": 0.5, "macro/f1": 0.5, "score": 0.75})
    track.line("saved runs/x/checkpoint-10")
    track.close()
    track.close()
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("step 10/20  loss 0.2000  1,230 tokens/s") and first.endswith("left")
    assert second == "evaluation at step 10: macro/f1 0.5000  score 0.7500"
    assert third == "saved runs/x/checkpoint-10"


def test_wandb_gets_curves_of_the_first_tasks_only(wandb: Any, tmp_path: Path) -> None:
    config = Config(max_steps=5, track=TrackConfig(per_task_keys=1))
    track = tracker(tmp_path, config=config)
    track.log_train(1, measured(1))
    track.log_eval(1, {"sum/f1": 0.5, "loss/f1": 0.1, "macro/f1": 0.3, "score": 0.3})
    track.close()
    train, evaluation = wandb.runs[0].logged
    # "train/loss" belongs to no task, although one is called "loss".
    assert set(train) == {
        "train/loss",
        "train/loss/sum",
        "learning_rate/experts",
        "train/tokens_per_second",
        "step",
    }
    assert set(evaluation) == {"eval/sum/f1", "eval/macro/f1", "eval/score", "step"}
    assert "train/loss/loss" in read_log(tmp_path / "trainer_log.jsonl")[0]


def test_the_wandb_run_goes_on_after_a_resume(wandb: Any, tmp_path: Path) -> None:
    config = Config(max_steps=5)
    track = tracker(tmp_path, config=config)
    state = track.state_dict()
    track.close("failed")
    tracker(tmp_path, state, config=config).close()
    first, second = wandb.runs
    assert first.init["id"] == second.init["id"] == state["wandb_run_id"]
    assert (first.exit_code, second.exit_code) == (1, 0)


def test_wandb_trouble_does_not_stop_the_log(wandb: Any, tmp_path: Path) -> None:
    wandb.broken.add("log")
    stream = io.StringIO()
    track = tracker(tmp_path, config=Config(max_steps=5), stream=stream)
    for step in (1, 2):
        track.log_train(step, measured(step))
    track.close()
    assert len(read_log(tmp_path / "trainer_log.jsonl")) == 3
    assert stream.getvalue().count("warning") == 1


@pytest.mark.parametrize(
    "key, task",
    [
        ("train/loss/sum", "sum"),
        ("train/epochs/sum", "sum"),
        ("eval/sum/exact_match", "sum"),
        ("eval/macro/f1", None),
        ("train/loss", None),
        ("eval/score", None),
        ("learning_rate/experts", None),
        ("weight/sum", "sum"),
    ],
)
def test_task_of(key: str, task: str | None) -> None:
    assert task_of(key) == task


@pytest.mark.parametrize(
    "key, expected",
    [
        ("train/tokens_per_second", True),
        ("seconds", True),
        ("eval/seconds", True),
        ("train/step_time", True),
        ("train/loss/time", False),  # a task called time
        ("train/tokens/sum", False),
        ("eval/time/f1", False),
        ("weight/time", False),
    ],
)
def test_is_time(key: str, expected: bool) -> None:
    assert is_time(key) is expected


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a/b/c": 1, "d": 2}
