"""What holds for every method of balancing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.balancer import BALANCERS, Balancer
from taskmoe.train.balancing.base import BalancingError, task_losses

OPTIONS = {"coba": {"warmup": 2, "history": 4}, "dwa": {"window": 2}, "famo": {"lr": 0.1},
           "uncertainty": {"lr": 0.1}}  # fmt: skip
ADAPTIVE = sorted(set(BALANCERS) - {"fixed", "random"})


def make(name: str, T: int = 4, seed: int = 3) -> Balancer:
    return Balancer(name, T, OPTIONS.get(name, {}), seed)


def walk(balancer: Balancer, steps: range) -> list[Tensor]:
    """A run: each task falls at its own speed, task 1 is absent from every third step."""
    seen = []
    for step in steps:
        speeds_T = torch.linspace(0.6, 1.02, balancer.n_tasks, dtype=torch.float64)
        counts_T = torch.full((balancer.n_tasks,), 5)
        counts_T[1] = 0 if step % 3 == 2 else 7
        sums_T = 2 * speeds_T**step * counts_T
        seen.append(balancer.weights(step))
        balancer.update(sums_T, counts_T)
        if balancer.needs_second_forward:
            balancer.after_step(sums_T * speeds_T, counts_T)
        if balancer.needs_validation:
            balancer.on_validation(2 * speeds_T**step)
    return seen


@pytest.mark.parametrize("name", BALANCERS)
def test_weights_are_finite_positive_and_fp64(name: str) -> None:
    for w_T in walk(make(name), range(60)):
        assert w_T.shape == (4,)
        assert w_T.dtype == torch.float64
        assert w_T.isfinite().all()
        assert (w_T > 0).all()


@pytest.mark.parametrize("name", sorted(set(BALANCERS) - {"random"}))
def test_the_first_step_is_plain_training(name: str) -> None:
    assert make(name).weights(0).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_methods_react(name: str) -> None:
    assert (walk(make(name), range(12))[-1] - 1).abs().max() > 0.05


@pytest.mark.parametrize("name", BALANCERS)
def test_a_resumed_run_goes_on_where_it_was(stored, name: str) -> None:
    steady = make(name)
    want = walk(steady, range(11))
    first = make(name)
    walk(first, range(5))
    resumed = make(name)
    resumed.load_state_dict(stored(first.state_dict()))
    walk(first, range(5, 8))  # a state is a copy
    assert all(torch.equal(a, b) for a, b in zip(walk(resumed, range(5, 11)), want[5:], strict=True))


@pytest.mark.parametrize("name", BALANCERS)
def test_a_task_can_be_appended(stored, name: str) -> None:
    old = make(name)
    walk(old, range(9))
    new = make(name, T=5)
    new.load_state_dict(stored(old.state_dict()))
    assert all(w_T.isfinite().all() and len(w_T) == 5 for w_T in walk(new, range(9, 20)))
    if name in ("uncertainty", "coba"):  # the others share a sum
        again = make(name, T=5)
        again.load_state_dict(stored(old.state_dict()))
        assert again.weights(9).tolist() == pytest.approx([*old.weights(9).tolist(), 1.0])
    with pytest.raises(ConfigError, match=r"the checkpoint balances 4 tasks, this run has 3"):
        make(name, T=3).load_state_dict(old.state_dict())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_order_of_the_tasks_does_not_matter(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    here, there = make(name), make(name)
    for step in range(8):
        losses_T = torch.tensor([0.9, 0.7, 1.01, 0.99], dtype=torch.float64) ** step
        for balancer, l_T in ((here, losses_T), (there, losses_T[order])):
            balancer.update(l_T, torch.ones(4))
            if balancer.needs_second_forward:
                balancer.after_step(l_T**2, torch.ones(4))
            balancer.on_validation(l_T)
    assert torch.allclose(here.weights(8)[order], there.weights(8), rtol=1e-12)


@pytest.mark.parametrize("name", BALANCERS)
def test_losses_that_are_not_finite_are_named(name: str) -> None:
    with pytest.raises(BalancingError, match="the loss of task 2 is not finite"):
        make(name).update(torch.tensor([1.0, 1.0, float("nan"), 1.0]), torch.tensor([1, 1, 1, 1]))


def test_task_losses_by_hand() -> None:
    losses_T = task_losses(torch.tensor([6.0, float("nan"), 0.0]), torch.tensor([4, 0, 2]))
    assert losses_T[[0, 2]].tolist() == [1.5, 0.0]
    assert losses_T[1].isnan()


def test_settings_and_states_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"balancing\.method: 'dwaa' is not one of .*nearest is 'dwa'"):
        Balancer("dwaa", 2)
    with pytest.raises(ConfigError, match=r"balancing\.options\.windw: 'dwa' has no such option.*window"):
        Balancer("dwa", 2, {"windw": 3})
    with pytest.raises(ConfigError, match=r"balancing\.options\.n_tasks: 'dwa' has no such option"):
        Balancer("dwa", 2, {"n_tasks": 3})
    with pytest.raises(ConfigError, match=r"balancing\.method: the checkpoint has 'dwa', this run 'famo'"):
        make("famo").load_state_dict(make("dwa").state_dict())
