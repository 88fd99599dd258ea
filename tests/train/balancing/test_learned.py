from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchjd.scalarization import FAMO as TheirFAMO

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.balancer import Balancer
from taskmoe.train.balancing.base import BalancingError

ONES = torch.ones(3)


def test_uncertainty_descends_the_papers_loss_by_adam() -> None:
    """torch's Adam on sum_t exp(-s_t) l_t + s_t takes the same path."""
    balancer = Balancer("uncertainty", 3, {"lr": 0.05})
    s_T = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s_T], lr=0.05)
    for step in range(20):
        assert torch.allclose(balancer.weights(step), torch.exp(-s_T.detach()), atol=1e-12)
        losses_T = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64) * (1 + 0.1 * math.sin(step))
        adam.zero_grad()
        (torch.exp(-s_T) * losses_T + s_T).sum().backward()
        adam.step()
        balancer.update(losses_T, ONES)


def test_uncertainty_settles_at_the_inverse_loss() -> None:
    balancer = Balancer("uncertainty", 3, {"lr": 0.01})
    for _ in range(1500):
        balancer.update(torch.tensor([0.5, 1.0, 4.0]), ONES)
    assert balancer.weights(0).tolist() == pytest.approx([2.0, 1.0, 0.25], rel=1e-2)


def test_absent_tasks_do_not_move() -> None:
    """A task that comes every second step is where it would be after half the steps."""
    rare, often = Balancer("uncertainty", 2), Balancer("uncertainty", 2)
    for step in range(6):
        rare.update(torch.tensor([3.0, 3.0]), torch.tensor([1, step % 2]))
    for _ in range(3):
        often.update(torch.tensor([3.0, 3.0]), torch.tensor([1, 1]))
    assert rare.weights(0)[1] == often.weights(0)[1]
    assert rare.weights(0)[0] < often.weights(0)[0]


def famo_gradient(losses: list[Tensor], step: int, state: TheirFAMO) -> Tensor:
    values_T = losses[step].clone().requires_grad_()
    state(values_T).backward()
    return values_T.grad


def test_famo_equals_torchjd_on_the_same_losses() -> None:
    """Its gradient with respect to the losses, times T, is our weight; both learn from the second forward."""
    gen = torch.Generator().manual_seed(0)
    losses = [torch.rand(4, generator=gen, dtype=torch.float64) + 0.1 for _ in range(20)]
    theirs = TheirFAMO(4, lr=0.1, weight_decay=0.01).double()
    ours = Balancer("famo", 4, {"lr": 0.1, "gamma": 0.01})
    assert ours.needs_second_forward
    counts_T = torch.tensor([1, 2, 3, 4])
    for step in range(0, 20, 2):
        want_T = 4 * famo_gradient(losses, step, theirs)
        got_T = ours.weights(step, losses[step] * counts_T, counts_T)
        assert torch.allclose(got_T, want_T, rtol=1e-6)  # their logarithm has an epsilon inside
        assert float(got_T.sum()) == pytest.approx(4)
        theirs.update(losses[step + 1])
        ours.update(losses[step] * counts_T, counts_T)
        ours.after_step(losses[step + 1] * counts_T, counts_T)
    assert (got_T * losses[18] - (got_T * losses[18]).mean()).abs().max() > 0.05  # xi has moved


def test_famo_lifts_what_falls_least() -> None:
    balancer = Balancer("famo", 2, {"same_batch": False, "gamma": 0.0})
    assert not balancer.needs_second_forward
    for step in range(10):
        balancer.update(torch.tensor([1.0, 0.8**step]), torch.tensor([1, 1]))
    w_T = balancer.weights(10, torch.tensor([1.0, 1.0]), torch.tensor([1, 1]))
    assert w_T[0] > 1.1 > 0.9 > w_T[1]


def test_famo_without_the_steps_losses_uses_the_newest_known() -> None:
    balancer = Balancer("famo", 3)
    assert balancer.weights(0).tolist() == pytest.approx([1.0, 1.0, 1.0])
    balancer.update(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1, 1, 0]))
    total = 1 + 1 / 2 + 1
    assert balancer.weights(1).tolist() == pytest.approx([3 / total, 1.5 / total, 3 / total])
    here_T = balancer.weights(1, torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1, 0, 1]))
    assert here_T.tolist() == pytest.approx([4 / 3, 0.0, 2 / 3])


def test_famo_says_what_it_cannot_use() -> None:
    with pytest.raises(BalancingError, match="famo: the loss of task 1 is negative"):
        Balancer("famo", 2).update(torch.tensor([1.0, -2.0]), torch.tensor([1, 1]))
    with pytest.raises(BalancingError, match="famo: after_step without the losses from before"):
        Balancer("famo", 2).after_step(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]))
    with pytest.raises(ConfigError, match=r"balancing\.options\.same_batch: 1 is neither true nor false"):
        Balancer("famo", 2, {"same_batch": 1})
