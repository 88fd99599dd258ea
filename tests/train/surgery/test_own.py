from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchjd.aggregation import PCGradWeighting

from taskmoe.moe.config import ConfigError
from taskmoe.train.choices import generator
from taskmoe.train.surgery.base import SurgeryError
from taskmoe.train.surgery.combine import Surgery


def pcgrad_of_vectors(J_TP: Tensor, gen: torch.Generator) -> Tensor:
    """Algorithm 1 of the paper, on the gradients themselves."""
    out = torch.zeros_like(J_TP[0])
    for i in range(len(J_TP)):
        g = J_TP[i].clone()
        for j in torch.randperm(len(J_TP), generator=gen).tolist():
            if j != i and g @ J_TP[j] < 0:
                g -= (g @ J_TP[j]) / (J_TP[j] @ J_TP[j]) * J_TP[j]
        out += g
    return out


def test_pcgrad_by_hand() -> None:
    """g_0 = (1, 0), g_1 = (-1, 1): each loses its part along the other, (1/2, 1/2) + (0, 1)."""
    J_TP = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    w_T = Surgery("pcgrad").weights(J_TP @ J_TP.T, 0)
    assert torch.allclose(w_T, torch.tensor([2.0, 1.5], dtype=torch.float64), atol=1e-15)
    assert torch.allclose(w_T @ J_TP, torch.tensor([0.5, 1.5], dtype=torch.float64), atol=1e-15)
    mean_T = Surgery("pcgrad", {"reduction": "mean"}).weights(J_TP @ J_TP.T, 0)
    assert torch.allclose(mean_T, w_T / 2, atol=1e-15)


@pytest.mark.parametrize(("T", "P"), [(2, 3), (3, 4), (8, 5), (16, 40)])
def test_the_gramian_form_of_pcgrad_is_the_definition(jacobian, T: int, P: int) -> None:
    projected = 0
    for seed in range(5):
        J_TP = jacobian(T, P, seed)
        want_P = pcgrad_of_vectors(J_TP, generator(7, seed))
        got_P = Surgery("pcgrad", seed=7).weights(J_TP @ J_TP.T, seed) @ J_TP
        assert (got_P - want_P).norm() <= 1e-12 * want_P.norm()
        projected += int((got_P - J_TP.sum(0)).norm() > 1e-3 * want_P.norm())
    assert projected >= 3


@pytest.mark.parametrize("T", [2, 5, 16])
def test_pcgrad_equals_torchjd(jacobian, T: int) -> None:
    """torchjd shuffles with the global generator, so the same stream makes the same orders."""
    J_TP = jacobian(T, 7)
    gen = generator(3, 11)
    with torch.random.fork_rng():
        torch.set_rng_state(gen.get_state())
        want_T = PCGradWeighting()(J_TP @ J_TP.T)
    got_T = Surgery("pcgrad", seed=3).weights(J_TP @ J_TP.T, 11)
    assert (got_T - want_T).norm() <= 1e-12 * want_T.norm()


def test_three_tasks_may_still_conflict_after_pcgrad(jacobian) -> None:
    """What the docstring warns of is so: the guarantee is for two tasks."""
    worst = []
    for seed in range(20):
        J_TP = jacobian(6, 3, seed)
        worst.append((J_TP @ (Surgery("pcgrad").weights(J_TP @ J_TP.T, seed) @ J_TP)).min())
    assert min(worst) < -0.1


def test_nash_weights_are_the_inverse_of_their_own_inner_products(jacobian) -> None:
    for T, P in ((1, 3), (2, 5), (6, 20), (24, 60)):
        J_TP = jacobian(T, P)
        G_TT = J_TP @ J_TP.T
        w_T = Surgery("nash_mtl", {"ridge": 1e-12}).weights(G_TT, 0)
        product_T = w_T * (G_TT @ w_T)
        assert (w_T > 0).all()
        assert torch.allclose(product_T, G_TT.diagonal().mean().expand(T), rtol=1e-8)
        length = (w_T @ G_TT @ w_T).sqrt()
        assert torch.allclose(length, G_TT.diagonal().sum().sqrt(), rtol=1e-8)


def test_nash_does_not_see_the_scale_of_one_loss(jacobian) -> None:
    J_TP = jacobian(4, 9)
    scaled_TP = J_TP * torch.tensor([1.0, 50.0, 1.0, 0.1], dtype=torch.float64)[:, None]
    one_P = Surgery("nash_mtl").weights(J_TP @ J_TP.T, 0) @ J_TP
    other_P = Surgery("nash_mtl").weights(scaled_TP @ scaled_TP.T, 0) @ scaled_TP
    assert torch.allclose(one_P / one_P.norm(), other_P / other_P.norm(), atol=1e-10)


def test_nash_stays_finite_where_gradients_cancel() -> None:
    opposed_TT = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    w_T = Surgery("nash_mtl", {"ridge": 1e-6}).weights(opposed_TT, 0)
    assert torch.allclose(w_T, torch.tensor(1e3, dtype=torch.float64), rtol=1e-3)
    with pytest.raises(SurgeryError, match=r"no solution in 1 iterations; raise surgery\.options\.ridge"):
        Surgery("nash_mtl", {"max_iterations": 1}).weights(opposed_TT, 0)


def test_random_weights_are_around_one_and_differ_by_step() -> None:
    surgery = Surgery("random", seed=5)
    draws_nT = torch.stack([surgery.weights(torch.eye(4), step) for step in range(500)])
    assert torch.allclose(draws_nT.sum(1), torch.tensor(4.0, dtype=torch.float64))
    assert (draws_nT > 0).all()
    assert (draws_nT.mean(0) - 1).abs().max() < 0.2
    assert (draws_nT[0] - draws_nT[1]).abs().max() > 1e-3


def test_fixed_weights_go_by_task_id() -> None:
    surgery = Surgery("fixed", {"weights": [1, 2, 0.5]})
    assert surgery.weights(torch.eye(2), 0, rows=[2, 1]).tolist() == [0.5, 2.0]
    with pytest.raises(ConfigError, match=r"surgery\.options\.weights: 3 weights, but the step holds task 3"):
        surgery.weights(torch.eye(2), 0, rows=[0, 3])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pcgrad", {"reduction": "max"}, r"surgery\.options\.reduction: 'max'"),
        ("pcgrad", {"reductoin": "sum"}, r"surgery\.options\.reductoin: 'pcgrad' has no such.*reduction"),
        ("sum", {"weights": [1]}, r"surgery\.options\.weights: 'sum' has no such option; it takes none"),
        ("fixed", {"weights": [1, float("nan")]}, r"surgery\.options\.weights: nan is no finite number >= 0"),
        ("fixed", {"weights": [-1]}, r"surgery\.options\.weights: -1"),
        ("fixed", {}, r"surgery\.options\.weights: 'fixed' needs it"),
        ("nash_mtl", {"ridge": 0}, r"surgery\.options\.ridge: 0 is no finite number > 0"),
        ("nash_mtl", {"max_iterations": 2.5}, r"surgery\.options\.max_iterations: 2\.5 is no integer >= 1"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Surgery(name, options)
