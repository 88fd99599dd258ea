"""Terms of experts' parameters, against whole matrices and loops over pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, attach, penalty
from taskmoe.moe.regularisers.expert_terms import ExpertDistance


def made(tiny, shaken, **settings):
    config = TaskMoEConfig.from_dict({"r": 2, "num_experts": 3, **settings})
    return shaken(attach(tiny("llama"), config, ["a", "b"], dry_run=False)).double()


def banks(model):
    return [m.bank for m in model.modules() if hasattr(m, "bank")]


def orthogonality(bank, factor):
    found = []
    for e, f in itertools.combinations(range(3), 2):
        M, N = getattr(bank, factor)[e], getattr(bank, factor)[f]
        cosines = [[(m @ n) / (m.norm() * n.norm()) for n in N] for m in M]
        found.append(sum(c**2 for row in cosines for c in row) / len(M))
    return sum(found) / len(found)


def distance(bank, _):
    deltas = [bank.B_ErN[e].T @ bank.A_ErK[e] for e in range(3)]
    pairs = list(itertools.combinations(deltas, 2))
    return sum((x * y).sum() / (x.norm() * y.norm()) for x, y in pairs) / len(pairs)


CASES = [
    ({"orthogonality": 0.3}, orthogonality, "A_ErK"),
    ({"orthogonality": {"weight": 0.3, "factor": "B"}}, orthogonality, "B_ErN"),
    ({"expert_distance": 0.3}, distance, None),
]


@pytest.mark.parametrize(("regularisers", "dense", "factor"), CASES)
def test_value_and_gradient_are_the_formulas(regularisers, dense, factor, tiny, shaken, gradients, close):
    model = made(tiny, shaken, regularisers=regularisers)
    expected = 0.3 * sum(dense(b, factor) for b in banks(model)) / len(banks(model))
    wanted = [p for b in banks(model) for p in b.parameters()]
    theirs = torch.autograd.grad(expected, wanted, allow_unused=True)
    value = penalty(model, ["a"])
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    ours = torch.autograd.grad(value, wanted, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            close(mine, other, 1e-10)
    assert any(g is not None and g.any() for g in ours)


def test_bounds(tiny, shaken):
    """0 for orthogonal subspaces, 1 for one and the same; the distance from -1 to 1."""
    model = made(tiny, shaken, num_experts=2, regularisers={"orthogonality": 1.0, "expert_distance": 1.0})
    with torch.no_grad():
        for bank in banks(model):
            basis = torch.eye(bank.A_ErK.shape[-1]).double()
            bank.A_ErK.copy_(torch.stack([basis[:2], basis[2:4] * 7]))
    apart, _ = model.penalties.of_parameters()
    with torch.no_grad():
        for bank in banks(model):
            bank.A_ErK[1] = bank.A_ErK[0] * 3
            bank.B_ErN[1] = -bank.B_ErN[0]
    same, opposed = model.penalties.of_parameters()
    assert apart.item() == 0 and same.item() == pytest.approx(1) and opposed.item() == pytest.approx(-1)


def test_at_the_start_equal_experts_have_a_finite_gradient(tiny):
    config = TaskMoEConfig(r=2, num_experts=3, regularisers={"expert_distance": 1.0, "orthogonality": 1.0})
    model = attach(tiny("llama"), config, ["a"], dry_run=False)
    penalty(model, ["a"]).backward()
    for bank in banks(model):
        assert bank.A_ErK.grad.isfinite().all() and not bank.B_ErN.grad.any()


def test_a_bank_without_factors_is_not_read():
    term = ExpertDistance(None, TaskMoEConfig(), [])
    assert term.reads(torch.nn.Linear(2, 2)) == []


def test_fusion_identity_is_the_sum_over_layers(tiny, shaken, close):
    config = TaskMoEConfig(bank="fusion", num_experts=2, router="task_table", gate="one_hot", r=2,
                           regularisers={"fusion_identity": 0.01})  # fmt: skip
    model = shaken(attach(tiny("llama"), config, ["a", "b"])).double()
    values = [p for n, p in model.named_parameters() if n.endswith(("value_NN", "value_TNN"))]
    assert values
    expected = sum((torch.eye(v.shape[-1]).double() - v).square().sum((-1, -2)).mean() for v in values) * 0.01
    value = penalty(model, ["a"])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    theirs = torch.autograd.grad(expected, values)
    for mine, other in zip(torch.autograd.grad(value, values), theirs, strict=True):
        close(mine, other, 1e-12)
