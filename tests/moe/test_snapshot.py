"""What a mixture's routing is: of the router by task, and counted from tokens."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.moe.snapshot import DECAY, FILE, Snapshot, SnapshotError, TokenGates, take, token_places
from taskmoe.moe.token_routing import TokenRouting

TOKENS = {"r": 2, "num_experts": 3, "router": "token_linear"}


def attached(tiny, tasks=3, kind="llama", **settings):
    return attach(tiny(kind), TaskMoEConfig(**settings), tasks)


def spied(model):
    """{layer: gates [M, E] of every call}, looked at from outside."""
    seen = {}

    def look(module, args, gate):
        gates = gate.values.detach()
        if gate.slots is not None:
            gates = torch.zeros(len(gates), module.num_experts).scatter(1, gate.slots, gates)
        seen.setdefault(module.name, []).append(gates)

    for module in model.modules():
        if isinstance(module, TokenRouting):
            module.register_forward_hook(look)
    return seen


def test_by_task_they_are_the_routers_gates(tiny, tmp_path):
    model = attached(tiny, r=2, num_experts=4, router_init_std=1.0, router_scope="layer")
    snapshot = take(model)
    assert snapshot.level == "task" and list(snapshot.gates) == model.routing.groups
    for name, gates in model.gates().items():
        assert torch.equal(snapshot.gates[name], gates) and gates.shape == (3, 1, 4)
    model.save_pretrained(tmp_path)
    again = Snapshot.load(tmp_path / FILE)
    assert again.level == "task" and list(again.gates) == list(snapshot.gates)
    assert all(torch.equal(again.gates[n], g) for n, g in snapshot.gates.items())


def test_routes_that_all_groups_share_are_saved(tiny, tmp_path):
    given = {"experts": {"*": 1}}
    model = attached(tiny, r=2, num_experts=3, router="fixed", gate="raw", router_options=given)
    assert len(model.routing.groups) > 1
    model.save_pretrained(tmp_path)
    again = Snapshot.load(tmp_path / FILE)
    assert all(torch.equal(again.gates[n], g) for n, g in model.gates().items())


@pytest.mark.parametrize("gate", [{"gate": "softmax"}, {"gate": "top_k", "top_k": 2}])
def test_by_token_they_are_the_mean_over_a_tasks_tokens(tiny, batch, gate):
    model = attached(tiny, **TOKENS, **gate)
    seen = spied(model)
    inputs = batch("llama", [0, 2, 0])
    inputs["attention_mask"][1, 4:] = 0  # padding does not count
    with model.recording():
        model(**inputs)
        model(**batch("llama", [2], seed=1))
    model(**batch("llama", [1], seed=2))  # not recorded
    model.recorder.fold()
    found = take(model)
    assert found.level == "token"
    for layer, (first, second, _) in seen.items():
        rows = first.unflatten(0, (3, 9))
        mean_0 = torch.cat([rows[0], rows[2]]).mean(0)
        mean_2 = torch.cat([rows[1, :4], second]).mean(0)
        torch.testing.assert_close(found.gates[layer][0, 0], mean_0)
        torch.testing.assert_close(found.gates[layer][2, 0], mean_2)
        assert found.gates[layer][1].isnan().all()


def test_older_passes_count_for_less_and_padding_of_a_task_counts_nothing(tiny, batch):
    model = attached(tiny, **TOKENS)
    seen = spied(model)
    for seed in (0, 1):
        with model.recording():
            model(**batch("llama", [1], seed=seed))
        model.recorder.fold()
    for layer, (old, new) in seen.items():
        expected = (DECAY * old.sum(0) + new.sum(0)) / (9 * (1 + DECAY))
        torch.testing.assert_close(take(model).gates[layer][1, 0], expected)


def test_ranks_are_added_up(tiny, batch):
    model = attached(tiny, **TOKENS)
    with model.recording():
        model(**batch("llama", [0]))
    model.recorder.fold(lambda x: 2 * x)
    single = attached(tiny, **TOKENS)
    single.load_state_dict(model.state_dict())
    with single.recording():
        single(**batch("llama", [0]))
        single(**batch("llama", [0]))
    single.recorder.fold()
    for layer, gates in take(single).gates.items():
        torch.testing.assert_close(take(model).gates[layer], gates, equal_nan=True)


def test_looking_changes_nothing(tiny, batch):
    gradients = []
    for looks in (False, True):
        torch.manual_seed(1)
        model = attached(tiny, **TOKENS, lora_dropout=0.5).train()
        torch.manual_seed(2)
        inputs = batch("llama", [0, 1, 1])
        if looks:
            with model.recording():
                loss = model(**inputs, labels=inputs["input_ids"]).loss
        else:
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_sums_are_saved_and_gone_on_with(tiny, batch, tmp_path):
    model = attached(tiny, **TOKENS)
    with model.recording():
        model(**batch("llama", [0, 1]))
    model.recorder.fold()
    model.save_pretrained(tmp_path)
    grown = attached(tiny, tasks=["task-0", "task-1", "task-2", "new"], **TOKENS)
    again = TokenGates(grown)
    again.load(tmp_path)
    other = TokenGates(grown)
    other.go_on(again)
    for layer, gates in take(model).gates.items():
        assert torch.equal(other.gates()[layer][:2], gates[:2])
        assert other.gates()[layer][2:].isnan().all()
    elsewhere = attached(tiny, kind="gpt2", **TOKENS)
    with pytest.raises(SnapshotError, match="other layers"):
        elsewhere.recorder.load(tmp_path)


def test_banks_that_gate_for_themselves_are_seen(tiny, batch):
    keys = attached(tiny, bank="own_keys", r=8, bank_options={"top_k": 3})
    fusion = attached(
        tiny,
        bank="fusion",
        r=2,
        num_experts=3,
        router="fixed",
        gate="raw",
        router_options={"experts": {"task-0": 0, "task-1": 1, "task-2": 2}},
    )
    assert take(fusion).level == "task"  # until the attention has been seen at work
    for model in (keys, fusion):
        with model.recording():
            model(**batch("llama", [0, 2]))
        model.recorder.fold()
        found = take(model)
        assert found.level == "token" and len(found.gates) == len(token_places(model)) > 0
        for gates in found.gates.values():
            torch.testing.assert_close(gates[[0, 2]].sum(-1), torch.ones(2, 1))


def test_experts_without_gates_have_none(tiny):
    model = attached(tiny, bank="prompt", bank_options={"length": 2}, target_modules=None)
    assert take(model) == Snapshot("none", {}) and model.recorder is None


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / FILE
    with pytest.raises(SnapshotError, match=FILE):
        Snapshot.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(SnapshotError, match="not a readable routing file"):
        Snapshot.load(path)
    Snapshot("other", {"a": torch.zeros(1, 1, 2)}).save(path)
    with pytest.raises(SnapshotError, match="level 'other'"):
        Snapshot.load(path)
