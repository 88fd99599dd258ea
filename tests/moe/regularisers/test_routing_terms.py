"""Terms of the routing of tasks, against loops over groups, tasks and heads; and the window of tasks."""

from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, attach, penalty
from taskmoe.moe.gates import GATES
from taskmoe.moe.regularisation import routed
from taskmoe.moe.regularisers.kinds import read_regularisers
from taskmoe.moe.sigmoid_gates import BernoulliOptions, SigmoidOptions

TASKS = ["a", "b", "c", "d"]
L2 = {"gate": "sigmoid", "gate_options": {"normalise": "l2"}}
ROUNDED = (  # their values have no slope of their own
    {"gate": "one_hot"},
    {"gate": "gumbel_one_hot"},
    {"gate": "bernoulli", "gate_options": {"straight_through": True, "dropout": 0.5}},
)


def made(tiny, shaken, **settings):
    config = TaskMoEConfig.from_dict({"r": 2, "num_experts": 4, "router_init_std": 1.0, **settings})
    return shaken(attach(tiny("llama"), config, TASKS, dry_run=False)).double().train()


def rows(logits_STHE):
    """Every [E] of it, as lists of plain numbers."""
    return logits_STHE.flatten(0, 2).unbind(0)


def softmax(z):
    total = sum(math.exp(float(v)) for v in z)
    return [math.exp(float(v)) / total for v in z]


def z_loss(logits, tasks):
    return sum(math.log(sum(math.exp(float(v)) for v in z)) ** 2 for z in rows(logits)) / len(rows(logits))


def entropy(logits, tasks):
    found = [-sum(p * math.log(p) for p in softmax(z / 2)) for z in rows(logits)]  # temperature 2
    return sum(found) / len(found)


def balance(logits, tasks):
    """At its first call the window is the tasks of the step, so that f = P."""
    S, _, H, E = logits.shape
    found = []
    for s in range(S):
        for h in range(H):
            gates = [softmax(z / 2) for z in logits[s, :, h]]
            means = [sum(g[e] for g in gates) / len(gates) for e in range(E)]
            found.append(E * sum(m * m for m in means))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("name", "dense"), [("z_loss", z_loss), ("entropy", entropy), ("window_balance", balance)]
)
def test_the_value_is_the_formulas(name, dense, tiny, shaken):
    model = made(tiny, shaken, router_temperature=2.0, regularisers={name: 0.5})
    with torch.no_grad():
        logits = model.routing.logits(torch.tensor([0, 2, 3]))
    assert penalty(model, [3, 0, 2, 2]).item() == pytest.approx(0.5 * dense(logits, [0, 2, 3]), abs=1e-12)
    total, number = model.penalties.read()[name]
    assert float(total) == pytest.approx(dense(logits, [0, 2, 3]), abs=1e-12) and number == 1
    assert not model.penalties.read()


def test_sparsity_is_of_the_sigmoids(tiny, shaken):
    model = made(tiny, shaken, gate="sigmoid", compose="before", regularisers={"sparsity": 1.0})
    logits = model.routing.logits(torch.tensor([1]))
    found = [1 / (1 + math.exp(-float(v.detach()))) for z in rows(logits) for v in z]
    expected = sum(found) / len(rows(logits))
    assert penalty(model, ["b"]).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("z_loss", {}),
        ("entropy", {"router": "task_mlp", "router_hidden_dim": 4, "task_embedding_dim": 3}),
        ("sparsity", {"gate": "sigmoid", "compose": "before"}),
        ("window_balance", {}),
        ("window_balance", {"gate": "top_k", "top_k": 2}),
        *((name, gate) for gate in ROUNDED for name in ("window_balance", "entropy")),
    ],
)
def test_the_gradient_is_that_of_central_differences(name, settings, tiny, shaken):
    """Of the balance: with the load, which has no gradient, as it is before the step."""
    model = made(tiny, shaken, regularisers={name: 1.0}, **settings)
    window = {t: torch.rand(len(model.routing.groups), 1, 4).double() for t in range(4)}
    term = model.penalties.routing[name]

    def value():
        term.load_state({t: g.clone() for t, g in window.items()})
        if name == "window_balance":
            term.options = type(term.options)(decay=1 - 1e-15)  # the step itself does not move the load
        return penalty(model, [0, 1, 2])

    p = next(model.routing.router.parameters())
    value().backward()
    flat, gradient = p.data.view(-1), p.grad.view(-1)
    for i in gradient.abs().topk(5).indices.tolist():
        before, step = float(flat[i]), 1e-5
        flat[i] = before + step
        up = value().item()
        flat[i] = before - step
        down = value().item()
        flat[i] = before
        assert float(gradient[i]) == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9)
        assert abs(float(gradient[i])) > 1e-6


def test_a_phase_with_uniform_gates_has_a_gradient_of_zero(tiny, shaken):
    model = made(tiny, shaken, regularisers={"window_balance": 1.0, "entropy": -1.0})
    model.use_gate("uniform")
    value = penalty(model, [0, 1])
    value.backward()
    assert value.item() == pytest.approx(1 - math.log(4))
    gradient = model.routing.router.logits_STHE.grad
    assert gradient is not None and not gradient.any()


def window(model, tasks):
    model.zero_grad()
    penalty(model, tasks).backward()
    return model.routing.router.logits_STHE.grad


def test_one_task_a_batch_is_left_alone_as_long_as_the_tasks_together_use_all_experts(tiny, shaken):
    """Task t on expert t: per batch this is the worst balance, over the window the best."""
    model = made(tiny, shaken, regularisers={"window_balance": 1.0})
    with torch.no_grad():
        model.routing.router.logits_STHE.copy_(8 * torch.eye(4).view(1, 4, 1, 4))
    for task in range(4):  # the window fills
        window(model, [task])
    for task in range(4):
        assert window(model, [task]).abs().max() < 1e-12
    per_batch = made(tiny, shaken, regularisers={"window_balance": 1.0})
    with torch.no_grad():
        per_batch.routing.router.logits_STHE.copy_(torch.eye(4).view(1, 4, 1, 4))
    assert window(per_batch, [1]).abs().max() > 1e-3  # a window of this batch alone


def test_a_crowded_expert_loses_and_an_empty_one_gains(tiny, shaken):
    model = made(tiny, shaken, regularisers={"window_balance": 1.0})
    with torch.no_grad():
        model.routing.router.logits_STHE.copy_(torch.tensor([3.0, 0.0, 0.0, -3.0]))
    window(model, [0, 1, 2, 3])
    gradient = window(model, [2])
    assert (gradient[:, 2, :, 0] > 0).all() and (gradient[:, 2, :, 3] < 0).all()
    assert not gradient[:, [0, 1, 3]].any()


def test_the_window_is_a_running_mean_a_task_and_comes_back(tiny, shaken):
    model = made(tiny, shaken, regularisers={"window_balance": {"weight": 1.0, "decay": 0.75}})
    term, table = model.penalties.routing["window_balance"], model.routing.router.logits_STHE
    first = torch.softmax(table[:, 1].detach(), -1)
    penalty(model, ["b"])
    with torch.no_grad():
        table.mul_(-1)
    second = torch.softmax(table[:, 1].detach(), -1)
    penalty(model, ["b", "c"])
    state = term.state()
    assert sorted(state) == [1, 2]
    assert torch.allclose(state[1], 0.75 * first + 0.25 * second, atol=1e-15)
    again = made(tiny, shaken, regularisers={"window_balance": 1.0})
    again.penalties.routing["window_balance"].load_state(state)
    assert torch.equal(again.penalties.routing["window_balance"].state()[1], state[1])


def test_shares_are_what_a_gate_was_before_it_was_rounded():
    logits, noise = torch.randn(5, 4).double(), torch.rand(5, 4).double()

    def shares(name, noise=None, options=None):
        return GATES[name].shares(logits, 0.7, noise, options)

    def values(name, noise=None, options=None):
        return GATES[name](logits, 0.7, None, noise, options)[0]

    assert torch.allclose(shares("one_hot"), values("softmax"))
    assert torch.allclose(shares("gumbel_one_hot", noise), values("gumbel", noise))
    rounded = BernoulliOptions(straight_through=True, shared=True, normalise="sqrt")
    assert torch.allclose(
        shares("bernoulli", noise, rounded), values("bernoulli", noise, BernoulliOptions(shared=True))
    )
    signed = values("sigmoid", options=SigmoidOptions(normalise="l2"))
    assert torch.allclose(
        shares("sigmoid", options=SigmoidOptions(normalise="l2")), signed.abs() / signed.abs().sum(-1, True)
    )


@pytest.mark.parametrize("gate", ["softmax", "one_hot", "top_k"])
def test_shares_sum_to_one_whatever_the_gate(gate, tiny, shaken):
    model = made(tiny, shaken, gate=gate, **({"top_k": 2} if gate == "top_k" else {}))
    found = routed(model.routing, [0, 1], torch.tensor([0, 1]), None)
    assert torch.allclose(found.shares_STHE.sum(-1), torch.ones(()).double())
    assert ((found.gates_STHE > 0).sum(-1) == {"softmax": 4, "one_hot": 1, "top_k": 2}[gate]).all()


@pytest.mark.parametrize(
    ("regularisers", "settings", "message"),
    [
        ({"z_los": 1.0}, {}, "moe.regularisers.z_los: unknown; known are .*nearest is 'z_loss'"),
        ({"z_loss": "much"}, {}, "moe.regularisers.z_loss: 'much' is no weight"),
        ({"z_loss": True}, {}, "moe.regularisers.z_loss: True is no weight"),
        ({"z_loss": float("inf")}, {}, "moe.regularisers.z_loss: inf is no weight"),
        ({"z_loss": 0}, {}, "moe.regularisers.z_loss: a weight of 0"),
        ({"z_loss": -1}, {}, "moe.regularisers.z_loss: a weight of -1"),
        ({"z_loss": {}}, {}, "moe.regularisers.z_loss.weight: is missing"),
        ({"z_loss": {"weight": 1, "decay": 0.5}}, {}, "moe.regularisers.z_loss.decay: unknown option"),
        ({"window_balance": {"weight": 1, "dec": 0.5}}, {}, "moe.regularisers.window_balance.dec: .*'decay'"),
        ({"window_balance": {"weight": 1, "decay": "x"}}, {}, "moe.regularisers.window_balance.decay: 'x'"),
        ({"window_balance": {"weight": 1, "decay": 1.0}}, {}, "moe.regularisers.window_balance.decay: 1.0"),
        ({"sparsity": 1.0}, {}, "moe.regularisers.sparsity: gate 'softmax' has no L1 norm"),
        ({"sparsity": 1.0}, L2, "moe.regularisers.sparsity: gate_options.normalise: l2 takes no sigmoid"),
        ({"orthogonality": {"weight": 1, "factor": "C"}}, {}, "moe.regularisers.orthogonality.factor: 'C'"),
        ({"token_balance": 1}, {"router": "token_linear"}, "moe.regularisers.token_balance: gate 'softmax'"),
        ({"alignment": {"weight": 1, "distance": "l2"}}, {}, "moe.regularisers.alignment.distance: 'l2'"),
        ({"z_loss": 1}, {"router": "none", "gate": "uniform"}, "moe.regularisers.z_loss: no router by task"),
        ({"token_z_loss": 1}, {}, "moe.regularisers.token_z_loss: no layer routes tokens"),
        ({"orthogonality": 1}, {"num_experts": 1}, "moe.regularisers.orthogonality: no experts here"),
        ({"fusion_identity": 1}, {}, "moe.regularisers.fusion_identity: no experts here"),
    ],
)
def test_what_cannot_be_is_an_error_with_its_key(regularisers, settings, message, tiny):
    config = TaskMoEConfig.from_dict({"r": 2, "regularisers": regularisers, **settings})
    with pytest.raises(ConfigError, match=message):
        attach(tiny("llama"), config, TASKS, dry_run=False)


def test_no_regularisers_no_penalty(tiny, shaken):
    model = made(tiny, shaken)
    assert model.penalties is None and penalty(model, [0]).item() == 0
    assert read_regularisers(model.moe_config) == {}
