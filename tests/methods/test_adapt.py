"""Every method's run takes a new task, by each way that fits it, and keeps the others as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.wrappers import inside
from taskmoe.train.adapt.modes import MODES
from taskmoe.train.adapt.settings import AdaptSettings
from taskmoe.train.adapt.study import adapt
from taskmoe.train.config import PhaseConfig
from taskmoe.train.instances import router_options
from taskmoe.train.loop import train
from taskmoe.train.trained_run import load_run

SETTINGS = AdaptSettings(skill_gym_unseen=1, max_steps=2, eval_steps=1, learning_rate=0.01, max_eval_rows=2)


MIXTURE = ("router", "nearest", "retrieve", "zero")
NO_MEAN = {
    "adapter",
    "generated",
    "fusion",
    "module",
    "prompt",
    "multitask_prompt",
    "prompt_bank",
    "mtl_lora",
    "own_keys",
}


@torch.no_grad()
def logits(run: Path, tasks: list[str]) -> torch.Tensor:
    trained = load_run(run)
    inputs, options = example_inputs(inside(trained.model.base_model)[0]), router_options(trained.config)
    if options is not None:
        inputs["instance_embeddings"] = torch.ones(3, options.dim)
    return torch.stack([trained.model(**inputs, task_ids=[task] * 3).logits for task in tasks])


@pytest.mark.slow
def test_a_new_task(method, tmp_path):
    groups = tuple(dict.fromkeys(group for phase in method.config.phases for group in phase.train))
    config = replace(
        method.config, max_steps=0, phases=(PhaseConfig(train=groups),), report_to=(),
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert train(config) == 0
    known, moe = method.data.bundle.tasks.names, config.moe
    before = logits(tmp_path / "run", known)
    found = adapt(tmp_path / "run", SETTINGS, tuple(MODES), (4,), out=tmp_path / "out")
    refused = {line.partition(":")[0] for line in found.remarks}
    assert {s.mode for s in found.scores} == set(MODES) - refused
    assert ("mean" in refused) == (moe.bank in NO_MEAN or method.name == "trex")
    assert "new_lora" not in refused
    given = config.moe.representation_options is not None and "path" in config.moe.representation_options
    if moe.router != "fixed" and not given:
        assert not refused & {"zero", "router+experts"}
    for score in found.scores:
        assert score.task not in known and score.rows == 2
        if score.mode in MIXTURE:
            assert torch.equal(logits(Path(str(score.folder)), known), before)
        else:
            assert score.task in load_run(str(score.folder)).model.tasks
