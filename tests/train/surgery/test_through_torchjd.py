from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torchjd.aggregation as theirs
from torchjd.linalg import QuadprogProjector

from taskmoe.moe.config import ConfigError
from taskmoe.train.surgery.base import SurgeryError
from taskmoe.train.surgery.combine import Surgery

THROUGH = ["upgrad", "dualproj", "cagrad", "mgda", "imtl_g", "aligned_mtl"]


def projector() -> QuadprogProjector:
    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-8)


# ours, options, torchjd's aggregator of the whole Jacobian, ours over theirs for T = 4
AGGREGATORS = [
    ("upgrad", {}, lambda: theirs.UPGrad(projector=projector()), 4),
    ("upgrad", {"reg_eps": 1e-4}, lambda: theirs.UPGrad(), 4),
    ("dualproj", {}, lambda: theirs.DualProj(projector=projector()), 4),
    ("cagrad", {"c": 0.5}, lambda: theirs.CAGrad(c=0.5), 4 / 1.5),
    ("cagrad", {"c": 0.5, "rescale": False}, lambda: theirs.CAGrad(c=0.5), 4),
    ("mgda", {}, lambda: theirs.MGDA(), 4),
    ("imtl_g", {}, lambda: theirs.IMTLG(), 4),
    ("aligned_mtl", {}, lambda: theirs.AlignedMTL(), 4),
    ("aligned_mtl", {"scale_mode": "rmse"}, lambda: theirs.AlignedMTL(scale_mode="rmse"), 4),
]


@pytest.mark.parametrize(("name", "options", "aggregator", "factor"), AGGREGATORS)
def test_the_update_is_torchjds_times_the_tasks(jacobian, name, options, aggregator, factor) -> None:
    J_TP = jacobian(4, 5, seed=0)
    want_P = factor * aggregator()(J_TP)
    got_P = Surgery(name, options).weights(J_TP @ J_TP.T, 0) @ J_TP
    assert (got_P - J_TP.sum(0)).norm() > 1e-3 * want_P.norm()  # the case is not that of `sum`
    assert (got_P - want_P).norm() <= 1e-6 * want_P.norm()


def test_upgrad_equals_torchjd_on_the_same_gramian(jacobian) -> None:
    for seed in range(5):
        J_TP = jacobian(6, 10, seed)
        G_TT = J_TP @ J_TP.T / (J_TP @ J_TP.T).diagonal().mean()
        want_T = 6 * theirs.UPGradWeighting(projector=projector())(G_TT)
        got_T = Surgery("upgrad").weights(G_TT, 0)
        assert (got_T - want_T).norm() <= 1e-12 * want_T.norm()


def test_upgrad_by_hand() -> None:
    """g_0 = (1, 0), g_1 = (-1, 1): for two tasks the projection is PCGrad's."""
    G_TT = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    w_T = Surgery("upgrad", {"reg_eps": 1e-12}).weights(G_TT, 0)
    assert torch.allclose(w_T, torch.tensor([2.0, 1.5], dtype=torch.float64), atol=1e-9)


def test_imtl_g_projects_equally(jacobian) -> None:
    J_TP = jacobian(4, 9)
    w_T = Surgery("imtl_g").weights(J_TP @ J_TP.T, 0)
    onto_T = J_TP @ (w_T @ J_TP) / J_TP.norm(dim=1)
    assert torch.allclose(onto_T, onto_T.mean().expand(4), rtol=1e-8)
    assert float(w_T.sum()) == pytest.approx(4)


def test_small_gradients_are_still_seen(jacobian) -> None:
    """torchjd alone takes a Gramian of trace under 1e-4 for zero and projects nothing."""
    J_TP = 1e-4 * jacobian(3, 4, seed=2)
    G_TT = J_TP @ J_TP.T
    assert torch.allclose(3 * theirs.UPGradWeighting()(G_TT), torch.ones(3, dtype=torch.float64), atol=1e-12)
    assert (Surgery("upgrad").weights(G_TT, 0) - 1).abs().max() > 0.1


@pytest.mark.parametrize("name", THROUGH)
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ConfigError, match=rf"surgery\.method: '{name}' .*pip install 'taskmoe\[surgery\]'"):
        Surgery(name)


@pytest.mark.parametrize(("name", "package"), [("upgrad", "quadprog"), ("cagrad", "cvxpy")])
def test_a_missing_solver_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    mixins = importlib.import_module("torchjd._mixins")
    find = mixins.find_spec
    monkeypatch.setattr(mixins, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    with pytest.raises(ConfigError, match=rf"pip install 'taskmoe\[surgery\]' .*{package}"):
        Surgery(name)


def test_a_solver_that_fails_says_for_which_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ValueError("no solution")

    monkeypatch.setattr(QuadprogProjector, "__call__", fail)
    with pytest.raises(SurgeryError, match=r"upgrad: the solver failed for the tasks \[4, 9\]: no solution"):
        Surgery("upgrad").weights(torch.eye(2), 0, rows=[4, 9])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("upgrad", {"reg_eps": 0.0}, r"surgery\.options\.reg_eps: 0\.0 is no finite number > 0"),
        ("cagrad", {"c": -1}, r"surgery\.options\.c: -1 is no finite number >= 0"),
        ("cagrad", {"rescale": 2}, r"surgery\.options\.rescale: 2 is neither true nor false"),
        ("mgda", {"epsilon": True}, r"surgery\.options\.epsilon: True"),
        ("aligned_mtl", {"scale_mode": "max"}, r"surgery\.options\.scale_mode: 'max'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Surgery(name, options)
