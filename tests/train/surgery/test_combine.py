"""What holds for every method that reads the Gramian: one table, one test a property."""

from __future__ import annotations

import json

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train.surgery.base import SurgeryError
from taskmoe.train.surgery.combine import METHODS, Surgery

OPTIONS = {"fixed": {"weights": [0.5, 1.5, 1.0, 2.0, 0.25, 1.0, 1.0, 1.0]}, "upgrad": {"reg_eps": 1e-10},
           "dualproj": {"reg_eps": 1e-10}, "mgda": {"epsilon": 1e-9, "max_iterations": 3000}}  # fmt: skip
RANDOM = {"pcgrad", "random"}  # drawn per row, so that another order of rows is another draw
# <g_t, d> >= -slack tr(G) w_t: what the solver's regularisation leaves
NEVER_CONFLICTS = {"upgrad": 1e-10, "dualproj": 1e-10, "nash_mtl": 0.0}


def make(name: str, seed: int = 0) -> Surgery:
    return Surgery(name, OPTIONS.get(name, {}), seed)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("T", "P"), [(1, 3), (2, 6), (5, 3), (8, 30)])
def test_weights_are_finite_and_fp64(jacobian, name: str, T: int, P: int) -> None:
    for J_TP in (jacobian(T, P), jacobian(T, P, together=2.0), jacobian(1, P).expand(T, P)):
        w_T = make(name).weights(J_TP @ J_TP.T, 0)
        assert w_T.shape == (T,)
        assert w_T.dtype == torch.float64
        assert w_T.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(METHODS) - RANDOM - {"fixed"}))
def test_the_order_of_the_tasks_does_not_matter(jacobian, name: str) -> None:
    J_TP = jacobian(6, 20, together=0.3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    there_P = make(name).weights(J_TP @ J_TP.T, 2) @ J_TP
    here_TP = J_TP[order]
    here_P = make(name).weights(here_TP @ here_TP.T, 2) @ here_TP
    tolerance = {"mgda": 1e-3, "cagrad": 1e-4}.get(name, 1e-9)  # iterative solvers stop at their precision
    assert (here_P - there_P).norm() <= tolerance * there_P.norm()


def test_fixed_weights_follow_their_tasks(jacobian) -> None:
    J_TP, order = jacobian(4, 6), [2, 0, 3, 1]
    there_T = make("fixed").weights(J_TP @ J_TP.T, 0)
    here_TP = J_TP[order]
    assert make("fixed").weights(here_TP @ here_TP.T, 0, rows=order).tolist() == there_T[order].tolist()


@pytest.mark.parametrize("name", sorted(NEVER_CONFLICTS))
@pytest.mark.parametrize(("T", "P"), [(2, 3), (3, 8), (6, 8), (8, 30)])
def test_the_update_conflicts_with_no_task(jacobian, name: str, T: int, P: int) -> None:
    conflicts = 0
    for seed in range(5):
        J_TP = jacobian(T, P, seed)
        w_T = make(name).weights(J_TP @ J_TP.T, 0)
        trace = (J_TP @ J_TP.T).trace()
        assert (J_TP @ (w_T @ J_TP) >= -trace * (1.01 * NEVER_CONFLICTS[name] * w_T.abs() + 1e-13)).all()
        conflicts += int((J_TP @ J_TP.sum(0)).min() < 0)
    assert conflicts  # of the plain sum


def test_pcgrad_conflicts_with_neither_of_two(jacobian) -> None:
    for seed in range(20):
        J_TP = jacobian(2, 3, seed)
        d_P = make("pcgrad").weights(J_TP @ J_TP.T, seed) @ J_TP
        assert (J_TP @ d_P).min() >= -1e-14 * (J_TP @ J_TP.T).trace()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e12])
def test_the_scale_of_all_losses_changes_no_weight(jacobian, name: str, scale: float) -> None:
    J_TP = jacobian(5, 9)
    G_TT = J_TP @ J_TP.T
    one_T, other_T = make(name).weights(G_TT, 3), make(name).weights(scale * G_TT, 3)
    assert torch.allclose(one_T, other_T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"mean", "random", "fixed"}))
def test_orthogonal_equal_gradients_give_the_sum(name: str) -> None:
    w_T = Surgery(name).weights(1e-9 * torch.eye(5), 0)
    assert torch.allclose(w_T, torch.ones(5, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("name", ["pcgrad", "upgrad", "dualproj"])
def test_gradients_that_agree_are_left_alone(jacobian, name: str) -> None:
    J_TP = jacobian(4, 30).abs()
    w_T = make(name).weights(J_TP @ J_TP.T, 0)
    assert torch.allclose(w_T, torch.ones(4, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_a_function_of_seed_and_step(jacobian, name: str) -> None:
    J_TP = jacobian(6, 5)
    G_TT = J_TP @ J_TP.T
    first, second = make(name, seed=4), make(name, seed=4)
    for step in (0, 3, 1):  # a resumed run asks for later steps first
        second.weights(G_TT, step)
    torch.rand(3)  # the global stream is nobody's business
    state = torch.get_rng_state()
    assert torch.equal(first.weights(G_TT, 3), second.weights(G_TT, 3))
    assert torch.equal(torch.get_rng_state(), state)
    if name in RANDOM:
        assert not torch.equal(first.weights(G_TT, 3), first.weights(G_TT, 4))
        assert not torch.equal(first.weights(G_TT, 3), make(name, seed=5).weights(G_TT, 3))


@pytest.mark.parametrize("name", METHODS)
def test_absent_tasks_are_left_out(jacobian, name: str) -> None:
    J_TP = jacobian(5, 9)
    here = torch.tensor([1, 2, 4, 5, 7])
    wide_TT = torch.zeros(8, 8, dtype=torch.float64)
    wide_TT[here[:, None], here] = J_TP @ J_TP.T
    narrow_T = make(name).weights(J_TP @ J_TP.T, 6, rows=here.tolist())
    wide_T = make(name).weights(wide_TT, 6)
    assert torch.equal(wide_T[here], narrow_T)
    assert wide_T[[0, 3, 6]].tolist() == [0.0, 0.0, 0.0]
    assert make(name).weights(torch.zeros(3, 3), 0).tolist() == [1.0, 1.0, 1.0]


def test_gradients_that_are_not_finite_are_named() -> None:
    G_TT = torch.eye(4)
    G_TT[1, :] = G_TT[:, 1] = float("nan")
    with pytest.raises(SurgeryError, match=r"step 12: the gradient of task 7 is not finite"):
        Surgery("pcgrad").weights(G_TT, 12, rows=[3, 7, 8, 9])
    G_TT = torch.eye(3)
    G_TT[0, 2] = G_TT[2, 0] = float("inf")
    with pytest.raises(SurgeryError, match=r"task 0, 2 is not finite"):
        Surgery("pcgrad").weights(G_TT, 0)


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Gramian of shape \(3, 3\) for 2 rows"):
        Surgery("sum").weights(torch.eye(3), 0, rows=[0, 1])


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"surgery\.method: 'pcgard' is not one of .*nearest is 'pcgrad'"):
        Surgery("pcgard")


def test_a_state_continues_the_same_run_only() -> None:
    state = json.loads(json.dumps(Surgery("pcgrad", seed=3).state_dict()))
    Surgery("pcgrad", seed=3).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"surgery\.seed: the checkpoint has 3, this run 4"):
        Surgery("pcgrad", seed=4).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"surgery\.method: the checkpoint has 'pcgrad', this run 'sum'"):
        Surgery("sum", seed=3).load_state_dict(state)
