from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.balancer import Balancer
from taskmoe.train.balancing.base import BalancingError
from taskmoe.train.balancing.coba import divergence_factor, scores, slopes


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_slopes_are_least_squares() -> None:
    """Through (0, 1), (1, 0), (2, 2) goes 1/2; a nan stays in its column."""
    ratios_nT = torch.stack([column(1, 1, math.nan), column(0, 0.5, 1), column(2, 0, 1)])
    got_T = slopes(ratios_nT)
    assert got_T[:2].tolist() == [0.5, -0.5]
    assert got_T[2].isnan()


def test_the_divergence_factor_stays_between_zero_and_one() -> None:
    """1 for a steady fall, near 0 for one that has almost ended; a steepening one would give tens."""
    assert divergence_factor(column(*[-0.1] * 20), 5.0) == pytest.approx(1.0)
    assert divergence_factor(column(*[-(0.8**n) for n in range(20)]), 5.0) < 1e-2
    steepening_n = column(*[-0.1] * 19, -0.2)
    unclamped = 20 * float((-5 * 20 * steepening_n / steepening_n.abs().sum()).softmax(0)[-1])
    assert unclamped > 10
    assert divergence_factor(steepening_n, 5.0) == 1.0
    assert divergence_factor(column(0, 0), 5.0) == pytest.approx(1.0)


def test_scores_by_hand() -> None:
    """Steady slopes -3/4 and -1/4 of equal history: DF is 1, only the relative score counts."""
    slopes_nT = torch.tensor([[-0.75, -0.25]] * 4, dtype=torch.float64)
    relative = [math.exp(-1.5), math.exp(-0.5)]
    relative = [r / sum(relative) for r in relative]
    logits = [math.exp(2 * r) for r in relative]
    assert scores(slopes_nT, 5.0).tolist() == pytest.approx([2 * x / sum(logits) for x in logits])


def test_a_task_that_rises_again_is_held_back() -> None:
    """Task 0 has begun to diverge, so DF is 0 and the absolute score takes over."""
    falling_n = -(0.9 ** torch.arange(30, dtype=torch.float64))
    slopes_nT = torch.stack([falling_n.clone(), falling_n], 1)
    slopes_nT[-3:, 0] = 0.5
    w_T = scores(slopes_nT, 5.0)
    assert w_T[0] < 0.5 < 1.5 < w_T[1]
    assert float(w_T.sum()) == pytest.approx(2)


def test_no_weight_falls_below_a_tenth_of_the_average() -> None:
    slopes_nT = torch.full((5, 8), -1e-9, dtype=torch.float64)
    slopes_nT[:, 0] = -1.0
    slopes_nT[-1, 0] = 100.0
    w_T = scores(slopes_nT, 5.0)
    assert w_T.min() >= 0.1 / 1.1
    assert scores(torch.zeros(3, 4, dtype=torch.float64), 5.0).tolist() == pytest.approx([1.0] * 4)


def test_weights_are_one_until_the_warm_up_is_over() -> None:
    balancer = Balancer("coba", 2, {"warmup": 4, "history": 3})
    assert balancer.needs_validation
    for n in range(4):
        assert balancer.weights(n).tolist() == [1.0, 1.0]
        balancer.on_validation(torch.tensor([2.0 - 0.1 * n, 4.0 - 0.01 * n]))
    ratios_nT = torch.tensor([[1.0 - 0.05 * n, 1 - 0.0025 * n] for n in range(4)], dtype=torch.float64)
    want_nT = torch.stack([slopes(ratios_nT[:2]), slopes(ratios_nT[:3]), slopes(ratios_nT[1:])])
    assert torch.allclose(balancer.weights(4), scores(want_nT, 5.0), atol=1e-6)
    assert balancer.weights(4)[1] > 1.2  # the slow one


def test_a_task_without_validation_rows_keeps_its_weight() -> None:
    whole, part = (Balancer("coba", n, {"warmup": 3, "history": 5}) for n in (3, 2))
    for n in range(6):
        whole.on_validation(torch.tensor([0.9**n, math.nan, 0.99**n]))
        part.on_validation(torch.tensor([0.9**n, 0.99**n]))
    w_T = whole.weights(0)
    assert w_T[1] == 1.0
    assert torch.equal(w_T[[0, 2]], part.weights(0))
    assert w_T[0] != 1.0


def test_validation_losses_that_cannot_be_used_are_named() -> None:
    with pytest.raises(BalancingError, match=r"coba: the validation loss of task 1 is .* or starts at 0"):
        Balancer("coba", 2).on_validation(torch.tensor([1.0, 0.0]))
    with pytest.raises(BalancingError, match="task 0 is infinite"):
        Balancer("coba", 2).on_validation(torch.tensor([math.inf, 1.0]))
    with pytest.raises(ConfigError, match=r"balancing\.options\.warmup: 1 is no integer >= 2"):
        Balancer("coba", 2, {"warmup": 1})
