from __future__ import annotations

import math

import pytest
import torch

from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.surgery.gramian import (
    conflict_fraction,
    cosines,
    direction_change,
    gramian,
    inactive,
    same_task_cosines,
    update_change,
)

# (1, 0), (-1, 1), nothing, (0, 2)
J_TP = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
G_TT = J_TP @ J_TP.T


def test_the_gramian_of_fp32_gradients_is_exact_and_additive() -> None:
    gen = torch.Generator().manual_seed(0)
    J_32 = torch.randn(3, 150_001, generator=gen) + 3  # a mean, so that fp32 sums would lose digits
    want_TT = J_32.double() @ J_32.double().T
    got_TT = gramian(J_32)
    assert got_TT.dtype == torch.float64
    assert torch.equal(got_TT, got_TT.T)
    assert (got_TT - want_TT).abs().max() <= 1e-12 * want_TT.abs().max()
    assert (J_32 @ J_32.T - want_TT).abs().max() > 1e-9 * want_TT.abs().max()
    parts_TT = gramian(J_32[:, :70_000]) + gramian(J_32[:, 70_000:])
    assert (parts_TT - want_TT).abs().max() <= 1e-12 * want_TT.abs().max()
    assert gramian(J_32[:, :0]).tolist() == torch.zeros(3, 3).tolist()


def test_cosines_by_hand() -> None:
    cos_TT = cosines(G_TT)
    half = math.sqrt(0.5)
    want_RR = torch.tensor([[1, -half, 0], [-half, 1, half], [0, half, 1]], dtype=torch.float64)
    assert torch.allclose(cos_TT[[0, 1, 3]][:, [0, 1, 3]], want_RR)
    assert cos_TT[2].isnan().all()
    assert cos_TT[:, 2].isnan().all()


def test_conflict_fraction_counts_pairs_with_a_gradient() -> None:
    assert conflict_fraction(G_TT) == pytest.approx(1 / 3)
    assert conflict_fraction(torch.eye(4)) == 0.0
    assert conflict_fraction(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 1.0
    assert math.isnan(conflict_fraction(torch.tensor([[1.0, 0.0], [0.0, 0.0]])))


def test_same_task_cosines_by_hand() -> None:
    first_T, second_T = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([4.0, 9.0, 1.0])
    cos_T = same_task_cosines(first_T, second_T, torch.tensor([1.0, -6.0, 0.0]))
    assert cos_T[:2].tolist() == [0.5, -1.0]
    assert cos_T[2].isnan()


def test_the_change_of_an_update_is_that_of_the_vectors() -> None:
    w_T = Surgery("pcgrad").weights(G_TT, 0)
    d_P, sum_P = w_T @ J_TP, J_TP.sum(0)
    assert update_change(G_TT, w_T) == pytest.approx(float((d_P - sum_P).norm() / sum_P.norm()))
    cos = float(d_P @ sum_P / d_P.norm() / sum_P.norm())
    assert direction_change(G_TT, w_T) == pytest.approx(math.sqrt(1 - cos**2))


def test_a_mere_factor_changes_the_update_but_not_its_direction() -> None:
    third_T = torch.full((4,), 1 / 3)
    assert update_change(G_TT, third_T) == pytest.approx(2 / 3)
    assert direction_change(G_TT, third_T) == pytest.approx(0, abs=1e-7)
    assert direction_change(G_TT, -third_T) == pytest.approx(1)
    assert direction_change(G_TT, torch.zeros(4)) == pytest.approx(1)


def test_inactive_is_below_one_per_cent() -> None:
    ones_T = torch.ones(4)
    assert inactive(update_change(G_TT, ones_T))
    assert inactive(update_change(G_TT, 1.0099 * ones_T))
    assert not inactive(update_change(G_TT, 1.0101 * ones_T))


def test_gradients_that_cancel_have_no_finite_change() -> None:
    opposed_TT = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert update_change(opposed_TT, torch.tensor([1.0, 1.0])) == 0.0
    assert update_change(opposed_TT, torch.tensor([1.0, 0.0])) == math.inf
