from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from taskmoe.train.track.log import END, JsonlLog, read_log


def write(path: Path, steps: range, resume_step: int | None = None) -> JsonlLog:
    log = JsonlLog(path, resume_step)
    for step in steps:
        log.write(step, "train", {"train/loss": 1 / step}, {"seconds": step})
    return log


def test_one_object_a_line_flushed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "trainer_log.jsonl"
    log = write(path, range(1, 3))
    lines = path.read_text().splitlines()  # before close
    log.close()
    expected = {"step": 1, "kind": "train", "train/loss": 1.0, "time": {"seconds": 1}}
    assert len(lines) == 2 and json.loads(lines[0]) == expected


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole, range(1, 9)).close()
    write(resumed, range(1, 7)).close()  # killed at step 6, last checkpoint at step 4
    write(resumed, range(5, 9), resume_step=4).close()
    assert resumed.read_bytes() == whole.read_bytes()


def test_resuming_takes_back_the_closing_line_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = write(path, range(1, 4))
    log.write(3, END, {"status": "interrupted"})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 3, "kind": "tra')
    assert [line["kind"] for line in read_log(path)] == ["train", "train", "train", "end"]
    write(path, range(4, 5), resume_step=3).close()
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 4


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 4)).close()
    write(path, range(1, 2)).close()
    assert [line["step"] for line in read_log(path)] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_resuming_where_no_log_was(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", range(5, 6), resume_step=4).close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lines_stay_json_when_a_run_diverges(tmp_path: Path, value: float) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    log.write(1, "train", {"train/loss": value})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert str(float(line["train/loss"])) == str(value)


def test_scalars_of_numpy_and_torch_and_foreign_text(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    values = {
        "a": np.float32(0.5),
        "b": torch.tensor(2.0),
        "c": "é",
        "d": [np.int64(3)],
        "e": None,
        "f": True,
    }
    log.write(1, "eval", values)
    log.close()
    line = read_log(tmp_path / "log.jsonl")[0]
    assert {k: line[k] for k in "abcdef"} == {"a": 0.5, "b": 2.0, "c": "é", "d": [3.0], "e": None, "f": True}
