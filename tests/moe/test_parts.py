"""A bank's task axis: the parts are each task's gradient, their sum is the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskmoe.kernels.low_rank import average
from taskmoe.moe.parts import average_by_task, splitter

T, E, r, D = 3, 4, 2, 12


class Kept:
    """Parts of the parameters that are wanted; ``weigh`` replaces what is summed."""

    halves = None

    def __init__(self, *wanted, weigh=None):
        self.wanted, self.weigh, self.found = [id(p) for p in wanted], weigh, []

    def wants(self, parameter):
        return id(parameter) in self.wanted

    def keep(self, parameter, tasks, halves, parts):
        assert len(halves) == len(tasks) == len(parts)
        self.found.append((parameter, list(tasks), parts.clone()))
        return None if self.weigh is None else parts * self.weigh

    def keep_gates(self, tasks, gradient):
        raise AssertionError("not here")


def tensors(H):
    bank = nn.Parameter(torch.randn(E, r, D, dtype=torch.float64))
    weights = torch.randn(T, H, E, dtype=torch.float64, requires_grad=True)
    return bank, weights, torch.randn(T, r, D, dtype=torch.float64)


@pytest.mark.parametrize("H", [1, 3])
def test_the_average_gives_each_task_its_part(H):
    bank, weights, out = tensors(H)
    (average(bank, weights) * out).sum().backward()
    plain, gates = bank.grad, weights.grad
    bank.grad = weights.grad = None
    kept = Kept(bank)
    (split,) = splitter(kept, [5, 7, 9], [0, 0, 0])(bank)
    assert split.shape == (T, E, r, D) and split.stride(0) == 0
    (average_by_task(split, weights) * out).sum().backward()
    ((parameter, tasks, parts),) = kept.found
    assert parameter is bank and tasks == [5, 7, 9]
    for t in range(T):
        alone = bank.detach().clone().requires_grad_()
        (average(alone, weights[t : t + 1].detach()) * out[t]).sum().backward()
        assert torch.allclose(parts[t], alone.grad, rtol=1e-12)
    assert torch.allclose(bank.grad, plain, rtol=1e-12)
    assert torch.allclose(weights.grad, gates, rtol=1e-12)


def test_the_forward_pass_is_the_plain_average():
    bank, weights, _ = tensors(2)
    (split,) = splitter(Kept(bank), range(T), [0] * T)(bank)
    assert torch.equal(average_by_task(split, weights), average(bank, weights))


def test_parts_may_be_weighed():
    bank, weights, out = tensors(1)
    factors = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).view(T, 1, 1, 1)
    kept = Kept(bank, weigh=factors)
    (split,) = splitter(kept, range(T), [0] * T)(bank)
    (average_by_task(split, weights) * out).sum().backward()
    assert torch.allclose(bank.grad, (kept.found[0][2] * factors).sum(0), rtol=1e-12)


def test_only_wanted_parameters_that_train_get_parts():
    a, b = nn.Parameter(torch.randn(E, r, D)), nn.Parameter(torch.randn(E, r, D), requires_grad=False)
    split = splitter(Kept(), [0, 1], [0, 0])
    assert [v.shape[0] for v in split(a, b)] == [1, 1]
    kept = Kept(a, b)
    views = splitter(kept, [0, 1], [0, 0])(a, b)
    assert [v.shape[0] for v in views] == [2, 2]  # an op takes both factors with one task axis
    sum(v.sum() for v in views).backward()
    assert [p is a for p, _, _ in kept.found] == [True]
    with torch.no_grad():
        assert splitter(kept, [0], [0])(a)[0].shape[0] == 1
