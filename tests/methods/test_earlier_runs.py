"""Files that begin with what an earlier run has left, and runs of no steps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from taskmoe.train.config import ConfigError, PhaseConfig
from taskmoe.train.config_io import load
from taskmoe.train.loop import train
from taskmoe.train.run_eval import score_run


@pytest.fixture
def ready(on_short_runs, tmp_path):
    """A file's settings, on the short runs that it needs."""

    def read(name, *given):
        path = f"configs/methods/{name}.yaml"
        few = ["--data.skill_gym.train_rows=40", "--data.skill_gym.validation_rows=4"]
        given = [f"--output_dir={tmp_path / name}", "--report_to=none", *few, *given]
        return on_short_runs(load(path, given))

    return read


def test_arrow_is_a_run_of_no_steps_that_eval_scores(ready, tmp_path):
    assert train(ready("arrow")) == 0
    state = load_file(tmp_path / "arrow" / "checkpoint-0" / "adapter_model.safetensors")
    directions = [t for n, t in state.items() if n.endswith("prototypes_EK")]
    assert directions and all(torch.allclose(t.norm(dim=1), torch.ones(8)) for t in directions)
    found = json.loads((tmp_path / "arrow" / "eval_results.json").read_text())["experts"]
    _, scored = score_run(tmp_path / "arrow")
    assert (scored["step"], scored["checkpoint"]) == (0, "checkpoint-0")
    assert scored["macro"] == found["macro"]


def test_steps_can_follow_a_run_that_had_none(ready, tmp_path):
    """With the mixture that depends on the number of steps, too."""
    given = ("--mixing.strategy=unimax", "--max_steps=0")
    assert train(ready("task_softmax", *given)) == 0
    first = load_file(tmp_path / "task_softmax" / "checkpoint-0" / "adapter_model.safetensors")
    assert train(replace(ready("task_softmax"), max_steps=2, resume_from_checkpoint="true")) == 0
    then = load_file(tmp_path / "task_softmax" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(not t.any() for n, t in first.items() if n.endswith("B_ErN"))
    assert all(t.any() for n, t in then.items() if n.endswith("B_ErN"))


def test_steps_of_what_cannot_train_are_refused(ready):
    config = replace(ready("arrow"), max_steps=2, phases=(PhaseConfig(train=("experts",)),))
    with pytest.raises(ConfigError, match=r"phases.train: nothing trains in this phase"):
        train(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imported", r"model_name_or_path: no such folder './runs/elm'; `taskmoe train` makes that of a run"),
        ("mpt_distilled", r"model_name_or_path: no such folder './runs/prompt_tuning'"),
    ],
)
def test_a_run_that_was_not_made_is_one_line(name, message, tmp_path, monkeypatch):
    config = load(f"configs/methods/{name}.yaml", [f"--output_dir={tmp_path / name}", "--report_to=none"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train(config)
