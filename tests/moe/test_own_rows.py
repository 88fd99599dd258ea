"""What belongs to new tasks alone: it can be trained, taken and put back, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.model import task_dims
from taskmoe.moe.new_tasks import OF_TASKS, has_rows, start_from, with_new_tasks
from taskmoe.moe.own_rows import OwnRows
from taskmoe.moe.state import load_model, save_adapter
from taskmoe.moe.tasks import TaskTable

TASKS = ["a", "b", "c"]
METHODS = {
    "task_table": {},
    "task_mlp": {"router": "task_mlp"},
    "token_task_sum": {"router": "token_task_sum"},
    "mtl_lora": {"bank": "mtl_lora"},
    "prompts": {"bank": "multitask_prompt"},
}


@pytest.fixture(params=METHODS)
def model(request, tiny, shaken):
    config = TaskMoEConfig.from_dict({**METHODS[request.param]})
    return shaken(attach(tiny("llama"), config, TASKS, dry_run=False)).eval()


def stepped(model, owned, batch):
    """One step of SGD on all three tasks."""
    owned.train()
    optimizer = torch.optim.SGD(owned.parameters.values(), lr=1.0, weight_decay=0.1)
    inputs = batch("llama", [0, 1, 2])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()


def test_only_the_rows_of_the_tasks_are_put(model, batch):
    inputs = batch("llama", [0, 1, 2])
    before = model(**inputs).logits
    state = {n: t.clone() for n, t in model.adapter_state_dict().items()}
    owned = OwnRows(model, [2], OF_TASKS)
    assert set(owned.parameters) == {n for n in task_dims(model) if n in dict(model.named_parameters())}
    stepped(model, owned, batch)
    assert all(not torch.equal(p.detach(), state[n]) for n, p in owned.parameters.items()), "decay moved all"
    taken = owned.take(2)
    owned.put({2: taken})
    after = model(**inputs).logits
    assert torch.equal(after[:2], before[:2])
    assert not torch.allclose(after[2], before[2])
    for name, value in model.adapter_state_dict().items():
        if name in owned.parameters:
            kept, axis = torch.tensor([0, 1]), task_dims(model)[name]
            assert torch.equal(value.index_select(axis, kept), state[name].index_select(axis, kept))
            assert torch.equal(value.select(axis, 2), taken[name])
        else:
            assert torch.equal(value, state[name])
    assert owned.count() == sum(part.numel() for part in taken.values())
    owned.put({})
    assert all(torch.equal(value, state[name]) for name, value in model.adapter_state_dict().items())


def test_nothing_else_trains(model):
    OwnRows(model, [2], OF_TASKS).train()
    axes = task_dims(model)
    assert model.trainable_names() and all(name in axes for name in model.trainable_names())


def test_one_task_may_have_everything_for_itself(model):
    owned = OwnRows(model, [1], ("experts", "router"), whole=True)
    assert set(owned.parameters) == {n for g in ("experts", "router") for n, _ in model.parameter_groups()[g]}
    assert owned.count() == sum(p.numel() for p in owned.parameters.values())
    with pytest.raises(ConfigError, match="2 tasks cannot each own"):
        OwnRows(model, [1, 2], ("experts",), whole=True)


def test_an_axis_that_is_not_of_tasks(tiny, shaken):
    model = shaken(attach(tiny("llama"), TaskMoEConfig(r=2, num_experts=3), TASKS, dry_run=False))
    name = next(n for n, _ in model.named_parameters() if n.endswith("A_ErK"))
    owned = OwnRows(model, [1], ("experts",), {name: 0})
    assert list(owned.parameters) == [name]
    assert torch.equal(owned.take(1)[name], model.get_parameter(name)[1])


def test_a_given_map_sends_a_task_where_another_goes(tiny, shaken, batch, tmp_path):
    config = TaskMoEConfig(
        r=2, num_experts=3, router="fixed", gate="raw", router_options={"experts": {"a": 2, "b*": 1}}
    )
    table = TaskTable.from_names(TASKS)
    wider = with_new_tasks(config, TaskTable.from_names(TASKS[:2]), ["c"])
    assert wider.router_options == {"experts": {"a": 2, "b": 1, "c": 2}}
    assert with_new_tasks(TaskMoEConfig(), table, ["d"]) == TaskMoEConfig()
    model = shaken(attach(tiny("llama"), wider, table, dry_run=False)).eval()
    ids = batch("llama", [0])["input_ids"]
    assert has_rows(model)
    start_from(model, {"c": "b"})
    assert torch.equal(
        model(input_ids=ids, task_ids=["c"]).logits, model(input_ids=ids, task_ids=["b"]).logits
    )
    assert not torch.allclose(
        model(input_ids=ids, task_ids=["a"]).logits, model(input_ids=ids, task_ids=["b"]).logits
    )
    save_adapter(model, tmp_path)
    again = load_model(tiny("llama"), tmp_path, dry_run=False).eval()
    assert torch.equal(
        again(input_ids=ids, task_ids=["c"]).logits, model(input_ids=ids, task_ids=["c"]).logits
    )


def test_models_in_which_nothing_belongs_to_a_task(tiny):
    config = TaskMoEConfig(r=2, num_experts=3, router="token_linear")
    assert not has_rows(attach(tiny("llama"), config, TASKS, dry_run=False))


@pytest.mark.parametrize("gate", ["softmax", "top_k"])
def test_gates_are_alike_while_gates_are_uniform(tiny, shaken, gate):
    top_k = 2 if gate == "top_k" else None
    config = TaskMoEConfig(r=2, num_experts=3, gate=gate, top_k=top_k)
    model = shaken(attach(tiny("llama"), config, TASKS, dry_run=False)).eval()
    routed = model.gates()
    with model.uniform_gates():
        uniform = model.gates()
    assert uniform.keys() == routed.keys() and len(routed) > 1
    for name, gates_THE in uniform.items():
        assert gates_THE.shape == routed[name].shape
        assert torch.equal(gates_THE, torch.full_like(gates_THE, 1 / 3))
        assert not torch.allclose(gates_THE, routed[name])
