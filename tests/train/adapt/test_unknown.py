"""Tasks that a run does not know: refused, or sent where others went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taskmoe.moe import TaskError, TaskMoEConfig
from taskmoe.moe.dry_run import example_inputs
from taskmoe.train.adapt.settings import AdaptError
from taskmoe.train.adapt.unknown import POLICIES, load_with_unknown, settings_with
from taskmoe.train.cli import main
from taskmoe.train.run_eval import score_run
from taskmoe.train.trained_run import open_run

TEXTS = {"date": ["red red w1", "red w0 red"]}


@torch.no_grad()
def logits(trained, task):
    model = trained.model
    return model(**example_inputs(model.base_model), task_ids=[task] * 3).logits


@pytest.fixture
def data(run, new_tasks, tmp_path):
    """The folder of one known task and one that is not."""
    for path in (run.parent / "data" / "berry", Path(new_tasks[1].path)):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_error_names_the_nearest(run, data):
    with pytest.raises(TaskError, match="unknown task 'date'; the nearest of 2 are"):
        score_run(run, [f"--data.root={data}"], "test")
    with pytest.raises(TaskError, match="unknown task 'date'"):
        load_with_unknown(open_run(run), TEXTS, "error")


def test_nearest_goes_as_the_task_with_such_texts(run, data, capsys):
    _, found = score_run(run, [f"--data.root={data}"], "test", unknown="nearest")
    assert set(found["tasks"]) == {"berry", "date"}
    assert "task 'date' is not of the run: routed as apple" in capsys.readouterr().err
    assert found["tasks"]["date"]["exact_match"] == 1.0
    trained = load_with_unknown(open_run(run), TEXTS, "nearest")
    assert torch.equal(logits(trained, "date"), logits(trained, "apple"))
    assert torch.equal(logits(trained, "berry"), logits(open_run(run).load(), "berry"))


def test_average_has_the_rows_of_the_rule(run, data, capsys):
    _, found = score_run(run, [f"--data.root={data}"], "test", unknown="average")
    assert "by the run's rule for new tasks" in capsys.readouterr().err
    trained = load_with_unknown(open_run(run), TEXTS, "average")
    rows = trained.model.routing.router.logits_STHE
    assert torch.allclose(rows[:, 2], rows[:, :2].mean(1))
    plain = score_run(run, split="test")[1]
    assert found["tasks"]["berry"]["loss"] == pytest.approx(plain["tasks"]["berry"]["loss"], rel=1e-5)


def test_tasks_that_are_known_need_no_policy(run):
    for policy in POLICIES:
        assert load_with_unknown(open_run(run), {"apple": []}, policy).model.tasks.names == ["apple", "berry"]


def test_runs_that_cannot_serve_them(run):
    opened = open_run(run)
    heads = replace(opened.config, task_type="SEQ_CLS")
    with pytest.raises(AdaptError, match="'date' is not of the run, which has no head"):
        settings_with(heads, opened.tasks, ["date"], "average")
    fixed = TaskMoEConfig(router="fixed", gate="raw", router_options={"experts": {"*": 0}})
    with pytest.raises(AdaptError, match="of which there is no average"):
        settings_with(replace(opened.config, moe=fixed), opened.tasks, ["date"], "average")
    found = settings_with(replace(opened.config, moe=fixed), opened.tasks, ["date"], "nearest")
    assert found.router_options == {"experts": {"apple": 0, "berry": 0, "date": 0}}


def test_the_command(run, data, capsys):
    given = ["eval", str(run), "--data", str(data), "--split", "test", "--json", "--unknown_task"]
    assert main([*given, "nearest"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["date"]["exact_match"] == 1.0
    assert main([*given, "closest"]) == 2
    assert "'closest' is not one of error, average, nearest" in capsys.readouterr().err
