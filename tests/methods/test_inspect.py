"""``taskmoe inspect --json`` of what each method saves: the same fields, and routing where there is some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from taskmoe.train.cli import main
from taskmoe.train.inspection import ARMS, METHOD, MODEL_NUMBERS, NUMBERS

FIELDS = {"source", "kind", "step", "run_name", "method", "level", "verdicts", "routing", "groups", "tasks",
          "clusters", "conflicts", "loss", "scores"}  # fmt: skip
OF_TASKS = {"name", "slug", "group", "cluster", "nearest", "top_experts", "first_loss", "loss", "tokens",
            "epochs", "effective_weight", "loss_weight", "metric", "value", "metrics"}  # fmt: skip
OF_GROUPS = {"num_experts", "num_heads", *NUMBERS, "heads", "experts"}


def test_the_fields_are_the_same(method, shaken, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shaken(method.build()).eval()
    with torch.no_grad(), model.recording():
        method.logits(model, method.batches(1)[0])
    if model.recorder is not None:
        model.recorder.fold()
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == FIELDS and found["method"].keys() == set(METHOD)
    assert found["routing"].keys() == set(MODEL_NUMBERS) and found["scores"].keys() == set(ARMS)
    assert [task["name"] for task in found["tasks"]] == model.tasks.names
    assert all(task.keys() == OF_TASKS for task in found["tasks"])
    assert all(group.keys() == OF_GROUPS for group in found["groups"].values())
    assert found["method"]["gate"] == model.moe_config.gate
    if found["level"] == "none":
        assert found["groups"] == {} and found["routing"]["entropy"] is None
    else:
        assert found["routing"]["entropy"] >= 0 and any(task["top_experts"] for task in found["tasks"])
        assert (found["level"] == "token") == (model.recorder is not None)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 0
    assert found["verdicts"][0][:40] in capsys.readouterr().out
