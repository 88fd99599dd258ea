"""A task that starts from another: what it owns is that task's, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskError, TaskMoEConfig, attach
from taskmoe.moe.heads import attach_heads
from taskmoe.moe.model import task_dims
from taskmoe.moe.new_tasks import start_from
from taskmoe.moe.tasks import TaskTable

TASKS = ["a", "b", "c"]
METHODS = {
    "task_table": {},
    "task_mlp": {"router": "task_mlp"},
    "gate_per_task": {"router": "gate_per_task"},
    "token_task_sum": {"router": "token_task_sum"},
    "mtl_lora": {"bank": "mtl_lora"},
}


@pytest.fixture(params=METHODS)
def model(request, tiny, shaken):
    config = TaskMoEConfig.from_dict({"r": 2, "num_experts": 3, **METHODS[request.param]})
    return shaken(attach(tiny("llama"), config, TASKS, dry_run=False)).eval()


def test_a_task_computes_what_the_one_it_starts_from_does(model, batch):
    inputs = batch("llama", [0, 1, 2])
    before = model(**inputs).logits
    ids = inputs["input_ids"][:1]
    seen = model(input_ids=ids, task_ids=["b"]).logits
    assert not torch.allclose(model(input_ids=ids, task_ids=["c"]).logits, seen)
    written = start_from(model, {"c": "b"})
    assert torch.equal(model(input_ids=ids, task_ids=["c"]).logits, seen)
    assert torch.equal(model(**inputs).logits[:2], before[:2]), "other tasks stay as they were"
    assert set(written) == set(task_dims(model))


def test_rows_are_copies(model):
    start_from(model, {"c": "b"})
    name = next(iter(task_dims(model)))
    parameter, axis = model.get_parameter(name), task_dims(model)[name]
    with torch.no_grad():
        parameter.select(axis, 2).add_(1.0)
    assert not torch.equal(parameter.select(axis, 2), parameter.select(axis, 1))


def test_heads_stay_and_unknown_tasks_are_named(tiny):
    table = TaskTable()
    for name in TASKS:
        table.add(name, labels=("no", "yes"))
    base = attach_heads(tiny("bert"), table, "mean")
    model = attach(base, TaskMoEConfig(r=2, num_experts=3), table, dry_run=False)
    heads = {n: p.clone() for n, p in model.parameter_groups()["heads"]}
    start_from(model, {"c": "a"})
    assert heads
    for name, value in heads.items():
        assert torch.equal(model.get_parameter(name), value)
    with pytest.raises(TaskError, match="unknown task 'd'"):
        start_from(model, {"d": "a"})
