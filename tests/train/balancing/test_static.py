from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.balancer import Balancer
from taskmoe.train.surgery.combine import Surgery


def test_fixed_weights_are_as_given() -> None:
    assert Balancer("fixed", 3).weights(0).tolist() == [1.0, 1.0, 1.0]
    balancer = Balancer("fixed", 2, {"weights": [0.5, 2]})
    balancer.weights(0).zero_()  # a caller may do as it likes with what it got
    assert balancer.weights(1).tolist() == [0.5, 2.0]
    with pytest.raises(ConfigError, match=r"balancing\.options\.weights: 2 weights for 3 tasks"):
        Balancer("fixed", 3, {"weights": [1, 1]})
    with pytest.raises(ConfigError, match=r"balancing\.options\.weights: -1 is no finite number >= 0"):
        Balancer("fixed", 1, {"weights": [-1]})


def test_random_weights_sum_to_the_tasks_and_differ_by_step() -> None:
    balancer = Balancer("random", 4, seed=5)
    draws_nT = torch.stack([balancer.weights(step) for step in range(300)])
    assert torch.allclose(draws_nT.sum(1), torch.tensor(4.0, dtype=torch.float64))
    assert (draws_nT.mean(0) - 1).abs().max() < 0.25
    assert not torch.equal(draws_nT[0], draws_nT[1])
    assert not torch.equal(draws_nT[0], Surgery("random", seed=5).weights(torch.eye(4), 0))


def test_dwa_by_hand() -> None:
    """Means of the windows: (4, 2, -) then (2, 2, 3). Rates 1/2, 1 and, with one window only, 1."""
    balancer = Balancer("dwa", 3, {"window": 2, "temperature": 0.5})
    counts = [[1, 2, 0], [1, 0, 0], [2, 1, 1], [2, 1, 0]]
    sums = [[3.0, 4.0, 0.0], [5.0, 0.0, 0.0], [2.0, 2.0, 3.0], [6.0, 2.0, 0.0]]
    for step, (sums_T, counts_T) in enumerate(zip(sums, counts, strict=True)):
        assert balancer.weights(step).tolist() == pytest.approx([1.0, 1.0, 1.0])
        balancer.update(torch.tensor(sums_T), torch.tensor(counts_T))
    total = math.exp(1) + 2 * math.exp(2)
    assert balancer.weights(4).tolist() == pytest.approx([3 * math.exp(n) / total for n in (1, 2, 2)])


def test_dwa_passes_over_a_window_without_the_task() -> None:
    balancer = Balancer("dwa", 2, {"window": 1})
    for losses, counts in (([4.0, 1.0], [1, 1]), ([0.0, 1.0], [0, 1]), ([2.0, 1.0], [1, 1])):
        balancer.update(torch.tensor(losses), torch.tensor(counts))
    ratio = balancer.weights(3)
    assert float(ratio[1] / ratio[0]) == pytest.approx(math.exp((1 - 0.5) / 2))
