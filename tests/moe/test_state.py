"""Saving and loading: growing task tables, and files that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from taskmoe.moe import (
    StateError,
    TaskError,
    TaskMoEConfig,
    TaskMoEModel,
    TaskTable,
    attach,
    attach_heads,
    load_adapter,
)
from taskmoe.moe.collapse import save_lora
from taskmoe.moe.snapshot import FILE as ROUTING
from taskmoe.moe.state import CONFIG, TASKS, WEIGHTS, read_config, save_adapter

OLD, NEW = ["a", "b"], ["a", "b", "c", "d"]
ROUTERS = {
    "task_table": ("routing.router.logits_STHE", 1),
    "task_mlp": ("routing.representation.embedding_TD", 0),
}


def settings(router="task_table", rows="mean"):
    return TaskMoEConfig(
        r=2, num_experts=3, router=router, task_embedding_dim=5, router_hidden_dim=4, new_task_rows=rows
    )


@pytest.fixture
def saved(tiny, shaken, tmp_path):
    """router, rule -> (the model that was saved, its folder)."""

    def make(router="task_table", rows="mean"):
        model = shaken(attach(tiny("llama"), settings(router, rows), OLD, dry_run=False)).eval()
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return make


@pytest.mark.parametrize(("gate", "heads"), [("sigmoid", 4), ("bernoulli", 1), ("softmax", 1)])
def test_a_new_task_of_poly_starts_at_the_average(gate, heads, tiny, shaken, tmp_path):
    config = TaskMoEConfig(
        r=2, num_experts=3, compose="before", num_heads=heads, gate=gate, new_task_rows="zero"
    )
    old = shaken(attach(tiny("llama"), config, OLD, dry_run=False))
    old.save_pretrained(tmp_path)
    grown = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path, TaskTable.from_names(NEW)).eval()
    for name, gates_THE in old.eval().gates().items():
        assert torch.allclose(grown.gates()[name][:2], gates_THE, rtol=1e-6)
        assert torch.allclose(grown.gates()[name][2:], torch.full((2, heads, 3), 1 / 3))
        assert not torch.allclose(gates_THE, torch.full((2, heads, 3), 1 / 3))


@pytest.mark.parametrize("rule", ["mean", "zero", "random"])
@pytest.mark.parametrize("router", ROUTERS)
def test_old_tasks_stay_and_new_rows_follow_the_rule(router, rule, tiny, saved, batch, head):
    old, folder = saved(router, rule)
    torch.manual_seed(5)
    fresh = attach(tiny("llama"), settings(router, rule), NEW, dry_run=False)
    name, axis = ROUTERS[router]
    start = dict(fresh.named_parameters())[name].detach().clone().movedim(axis, 0)
    load_adapter(fresh, folder)
    fresh.eval()
    inputs = batch("llama", [1, 0, 1])
    assert torch.equal(head(fresh(**inputs)), head(old(**inputs))), "old tasks: bit for bit"
    grown = dict(fresh.named_parameters())[name].movedim(axis, 0)
    known = dict(old.named_parameters())[name].movedim(axis, 0)
    assert torch.equal(grown[:2], known)
    expected = {
        "mean": known.mean(0).expand_as(grown[2:]),
        "zero": torch.zeros_like(grown[2:]),
        "random": start[2:],
    }
    assert torch.equal(grown[2:], expected[rule])
    assert head(fresh(**{**inputs, "task_ids": ["c", "d", "c"]})).isfinite().all()


def test_heads_grow_with_the_table(tiny, shaken, batch, tmp_path):
    def build(names):
        table = TaskTable()
        for name in names:
            table.add(name, ["x", "y"])
        torch.manual_seed(7)
        return attach(attach_heads(tiny("bert"), table, "mean"), settings(), table, dry_run=False).eval()

    old = shaken(build(OLD))
    old.save_pretrained(tmp_path)
    fresh = build(NEW)
    load_adapter(fresh, tmp_path)
    inputs = batch("bert", [1, 0])
    assert torch.equal(fresh(**inputs).logits, old(**inputs).logits)
    weight, known = fresh.base_model.classifier.weight_TNK, old.base_model.classifier.weight_TNK
    assert torch.equal(weight[3], known.mean(0))


def test_saved_modules_come_back(tiny, shaken, batch, head, tmp_path):
    config = TaskMoEConfig(r=2, num_experts=3, modules_to_save=("lm_head", "norm"))
    model = shaken(attach(tiny("llama"), config, OLD))
    model.save_pretrained(tmp_path)
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path)
    inputs = batch("llama", [1, 0])
    assert torch.equal(head(again(**inputs)), head(model(**inputs)))


def test_what_is_written(saved):
    model, folder = saved()
    assert sorted(p.name for p in folder.iterdir()) == sorted([WEIGHTS, CONFIG, TASKS, ROUTING])
    state = load_file(folder / WEIGHTS)
    assert state.keys() == set(model.trainable_names())
    assert not any("base.weight" in n for n in state), "the base is not written"
    values = json.loads((folder / CONFIG).read_text())
    assert values["peft_type"] == "TASKMOE"
    assert read_config(folder) == model.moe_config
    assert TaskTable.load(folder / TASKS).names == OLD


@pytest.mark.parametrize("router", ["task_table", "token_linear"])
def test_the_gate_in_force_is_saved_and_comes_back(router, routed, tiny, batch, head, tmp_path):
    model = routed("llama", router=router, gate="sigmoid", gate_options={"normalise": "sqrt"})
    model.use_gate("one_hot" if router == "task_table" else "softmax")
    model.routing.temperature = 0.37
    expected = head(model(**batch("llama", [2, 0, 1])))
    model.save_pretrained(tmp_path)
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(head(again(**batch("llama", [2, 0, 1]))), expected)
    assert again.moe_config == model.config_in_force() != model.moe_config
    if router == "task_table":
        save_lora(model, "sum", tmp_path / "lora")
        save_lora(again, "sum", tmp_path / "again")
        assert all(
            torch.equal(t, load_file(tmp_path / "lora" / WEIGHTS)[n])
            for n, t in load_file(tmp_path / "again" / WEIGHTS).items()
        )


def test_a_gate_that_cannot_be_attached_is_not_saved(routed, tmp_path):
    model = routed("llama")
    model.use_gate("uniform")
    with pytest.raises(StateError, match=r"moe\.router: 'task_table' with gate 'uniform'.* since use_gate"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model.use_gate("softmax")
    model.save_pretrained(tmp_path / "adapter")


def test_a_longer_table_at_loading(tiny, saved):
    _, folder = saved()
    table = TaskTable.from_names(NEW)
    again = TaskMoEModel.from_pretrained(tiny("llama"), folder, table)
    assert again.tasks.names == NEW
    assert again.routing.router.logits_STHE.shape[1] == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "tasks that are missing here: b; tasks only grow"),
        (["a", "renamed", "c"], "task 1 is 'renamed' here but 'b' in the checkpoint"),
        (["b", "a"], "task 0 is 'b' here but 'a'"),
    ],
)
def test_another_table_of_tasks(names, message, tiny, saved):
    _, folder = saved()
    with pytest.raises(TaskError, match=message):
        load_adapter(attach(tiny("llama"), settings(), names, dry_run=False), folder)


def edit(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def widen(state):
    name = next(n for n in state if n.endswith("down_proj.bank.A_ErK"))
    state[name] = state[name].repeat(1, 2, 1)


def third_row(state):
    name = "routing.router.logits_STHE"
    state[name] = torch.cat([state[name], state[name][:, :1]], 1)


BANK = "base_model.model.layers.0.self_attn.q_proj.bank.A_ErK"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit(f, lambda s: s.pop(BANK)),
            r"lacks .*q_proj\.bank\.A_ErK \(1 missing, 0 unexpected\)",
        ),
        (lambda f: edit(f, lambda s: s.update(more=torch.zeros(1))), "has more, which the model does not"),
        (lambda f: edit(f, widen), r"down_proj.* has shape \(3, 4, 24\), the model needs \(3, 2, 24\)"),
        (
            lambda f: edit(f, third_row),
            r"logits_STHE has shape \(14, 3, 1, 3\), the model needs \(14, 2, 1, 3\)",
        ),
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]),
            "not a readable safetensors file",
        ),
        (lambda f: (f / WEIGHTS).write_bytes(b"nonsense"), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS).unlink(), "not a readable safetensors file"),
    ],
)
@pytest.mark.parametrize("names", [OLD, NEW])
def test_weights_that_do_not_fit_leave_the_model_as_it_was(damage, message, names, tiny, saved):
    _, folder = saved()
    damage(folder)
    model = attach(tiny("llama"), settings(), names, dry_run=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(StateError, match=message):
        load_adapter(model, folder)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a readable adapter config"),
        (b"[]", "not a readable adapter config"),
        (b"\xff\xfe\x00", "not a readable adapter config"),
        (b"{}", "not a taskmoe adapter of format 1, but peft_type None"),
        (b'{"peft_type": "LORA", "r": 8}', "not a taskmoe adapter of format 1, but peft_type LORA"),
        (b'{"peft_type": "TASKMOE", "format": 2}', "peft_type TASKMOE, format 2"),
        (
            b'{"peft_type": "TASKMOE", "format": 1, "rank": 2}',
            r"adapter_config\.json: moe\.rank: unknown setting",
        ),
        (None, "not a readable adapter config"),
    ],
)
def test_a_config_that_cannot_be_read(content, message, tiny, saved):
    _, folder = saved()
    if content is None:
        (folder / CONFIG).unlink()
    else:
        (folder / CONFIG).write_bytes(content)
    with pytest.raises(StateError, match=message):
        TaskMoEModel.from_pretrained(tiny("llama"), folder)


def test_a_folder_that_is_not_there(tiny, tmp_path):
    with pytest.raises(StateError, match="nowhere"):
        TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "nowhere")
    with pytest.raises(TaskError, match="nowhere"):
        load_adapter(attach(tiny("llama"), settings(), OLD, dry_run=False), tmp_path / "nowhere")


def test_partitioned_tensors_are_not_written(tiny, tmp_path):
    model = attach(tiny("llama"), settings(), OLD, dry_run=False)
    state = {**model.adapter_state_dict(), BANK: torch.zeros(0)}
    with pytest.raises(StateError, match=r"q_proj.bank.A_ErK is empty; gather"):
        save_adapter(model, tmp_path, state)
    assert not (tmp_path / WEIGHTS).exists()


def test_another_number_of_experts(tiny, saved):
    _, folder = saved()
    model = attach(tiny("llama"), TaskMoEConfig(r=2, num_experts=4), OLD, dry_run=False)
    with pytest.raises(
        StateError, match=r"has shape \(3, 2, 16\), the model needs \(4, 2, 16\): other settings\?"
    ):
        load_adapter(model, folder)
