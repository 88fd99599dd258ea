"""Terms of the routing of tokens, against loops over tokens; padding counts for nothing."""

from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskTable
from taskmoe.moe.gates import GATES
from taskmoe.moe.options import options_of
from taskmoe.moe.regularisers.base import Rows
from taskmoe.moe.regularisers.kinds import read_regularisers
from taskmoe.moe.regularisers.token_terms import LocalisedBalance, TokenBalance, TokenCV, TokenZLoss

B, L, E = 4, 5, 4
TASKS = TaskTable.from_names(["facts", "chat"])
ROUTED = TaskMoEConfig(num_experts=E, router="token_linear", gate="top_k", top_k=2)


def layer(seed=0):
    """Logits [M, E], gates [M, E] with two experts a token, and rows of which some are padding."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(B * L, E, generator=draw, dtype=torch.float64).requires_grad_()
    largest, slots = torch.topk(logits, 2, dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, slots, torch.softmax(largest, -1))
    weights = torch.ones(B, L).double()
    weights[1, 3:] = 0
    weights[3, 1:] = 0
    tasks_M = torch.tensor([0, 1, 1, 0]).repeat_interleave(L)
    sequences_M = torch.arange(B).repeat_interleave(L)
    return logits, gates, Rows([0, 1], tasks_M, B, sequences_M, weights.flatten())


def real(rows):
    return [m for m in range(len(rows.weights_M)) if rows.weights_M[m]]


def balance(logits, gates, rows):
    chosen = [sum(1 for m in real(rows) if gates[m, e] > 0) for e in range(E)]
    shares = [sum(torch.softmax(logits[m], -1)[e] for m in real(rows)) / len(real(rows)) for e in range(E)]
    return E * sum(c / sum(chosen) * p for c, p in zip(chosen, shares, strict=True))


def z_loss(logits, gates, rows):
    return sum(logits[m].exp().sum().log() ** 2 for m in real(rows)) / len(real(rows))


def cv(logits, gates, rows):
    importance = [sum(gates[m, e] for m in real(rows)) for e in range(E)]
    mean = sum(importance) / E
    return sum((i - mean) ** 2 for i in importance) / E / mean**2


def localised(logits, gates, rows, delta=0.3, first=1):
    """Tasks of the first kind: chat (1); experts: the first one."""
    Z = []
    for b in range(B):
        own = [m for m in real(rows) if rows.sequences_M[m] == b]
        for e in range(E):
            matches = (int(rows.tasks_M[own[0]]) == 1) == (e < first)
            Z.append((1 + delta if matches else 1 - delta) * sum(gates[m, e] for m in own) / len(own))
    mean = sum(Z) / len(Z)
    return sum((z - mean) ** 2 for z in Z) / len(Z) / mean


OPTIONS = LocalisedBalance.Options(tasks=("chat",), experts=1, delta=0.3)
CASES = [
    (TokenBalance, None, balance),
    (TokenZLoss, None, z_loss),
    (TokenCV, None, cv),
    (LocalisedBalance, OPTIONS, localised),
]


def test_the_localised_balance_takes_half_of_the_experts_that_a_layer_has():
    config = TaskMoEConfig(
        num_experts=8, router="token_linear", gate="top_k", top_k=2, expert_pattern={"q_proj": E}
    )
    logits, gates, rows = layer()
    term = LocalisedBalance(LocalisedBalance.Options(tasks=("chat",), delta=0.3), config, TASKS)
    expected = localised(logits, gates, rows, first=E // 2).item()
    assert term.value(logits, gates, rows).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("pattern", "experts", "message"), [({"q_proj": 2}, 3, "3 of 2"), ({"q_proj": 1}, None, "0 of 1")]
)
def test_each_layer_has_experts_of_both_kinds(pattern, experts, message):
    config = TaskMoEConfig(num_experts=8, router="token_linear", expert_pattern=pattern)
    with pytest.raises(ConfigError, match=f"localised_balance.experts: {message}"):
        LocalisedBalance(LocalisedBalance.Options(tasks=("chat",), experts=experts), config, TASKS)


ALL_EXPERTS = "gate .* sends every token to every expert"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *(("token_balance", {"gate": g}, ALL_EXPERTS) for g in ("softmax", "sigmoid", "gumbel", "bernoulli")),
        ("token_balance", {"gate": "bernoulli", "gate_options": {"dropout": 0.5}}, ALL_EXPERTS),
        *(
            (name, {"router": router, "gate": "raw"}, f"moe.router '{router}' gives gates")
            for name in ("token_balance", "token_z_loss")
            for router in ("ranks", "token_cluster", "random_instances")
        ),
    ],
)
def test_a_term_that_reads_other_logits_or_loads_is_refused(name, settings, message):
    config = TaskMoEConfig.from_dict({"router": "token_linear", "regularisers": {name: 0.1}, **settings})
    with pytest.raises(ConfigError, match=f"moe.regularisers.{name}: .*{message}"):
        read_regularisers(config)


@pytest.mark.parametrize(
    ("gate", "options"),
    [("one_hot", None), ("gumbel_one_hot", None), ("bernoulli", {"straight_through": True})],
)
def test_gates_with_zeros_are_balanced(gate, options):
    config = TaskMoEConfig(
        router="token_linear", gate=gate, gate_options=options, regularisers={"token_balance": 0.1}
    )
    _, term = read_regularisers(config)["token_balance"]
    logits, _, rows = layer()
    logits = (logits.detach() + torch.tensor([4.0, 0.0, 0.0, -4.0])).requires_grad_()
    noise = torch.rand(B * L, E, generator=torch.Generator().manual_seed(1)).double()
    gates = GATES[gate](logits, 1.0, None, noise, options_of("gate", config, GATES[gate]))[0]
    (gradient,) = torch.autograd.grad(term.value(logits, gates, rows), logits)
    assert gradient.sum(0)[0] > 1e-3


@pytest.mark.parametrize(("kind", "options", "dense"), CASES)
def test_value_and_gradient_are_the_formulas(kind, options, dense, close):
    logits, gates, rows = layer()
    expected = dense(logits, gates, rows)
    (theirs,) = torch.autograd.grad(expected, logits)
    logits, gates, rows = layer()
    value = kind(options, ROUTED, TASKS).value(logits, gates, rows)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    (ours,) = torch.autograd.grad(value, logits)
    close(ours, theirs, 1e-12)
    assert ours.any()
    assert not ours[rows.weights_M == 0].any()


def test_the_localised_balance_is_level_where_matching_gates_are_the_smaller_ones():
    """As the paper writes it; said in METHODS.md."""
    _, _, rows = layer()
    term = LocalisedBalance(OPTIONS, ROUTED, TASKS)
    matches_ME = (rows.tasks_M == 1)[:, None] == (torch.arange(E) < 1)
    gates = 1 / torch.where(matches_ME, 1.3, 0.7).double()
    assert term.value(gates, gates, rows).item() == pytest.approx(0, abs=1e-12)
    assert gates[matches_ME].max() < gates[~matches_ME].min()


def test_a_level_load_costs_least():
    term = TokenBalance(None, ROUTED, TASKS)
    rows = Rows([0], torch.zeros(4).long(), 4, torch.arange(4), torch.ones(4))
    eye, crowd = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    assert term.value(9 * eye, eye, rows).item() == pytest.approx(1, abs=1e-3)
    assert term.value(9 * crowd, crowd, rows).item() == pytest.approx(4, abs=1e-2)
    assert math.isfinite(term.value(eye, eye, Rows([0], rows.tasks_M, 4, rows.sequences_M, torch.zeros(4))))
