"""How far logits are apart: none may be missing, and none beyond a task's labels is missed."""

from __future__ import annotations

from math import inf

import pytest
import torch

from taskmoe.train.export_check import _apart


@pytest.mark.parametrize(
    ("found", "expected", "apart"),
    [
        ([[1.0, -4.0]], [[1.0, -4.0]], 0.0),
        ([[1.0, -3.5]], [[1.0, -4.0]], 0.125),
        ([[1.0, -3.5]], [[1.0, -4.0, -inf]], 0.125),  # a head alone
        ([[1.0, -3.5, -inf]], [[1.0, -4.0, -inf]], 0.125),
        ([[1.0, -4.0, 0.0]], [[1.0, -4.0, -inf]], inf),  # of a label that the task lacks
        ([[1.0, -4.0, 0.0]], [[1.0, -4.0]], inf),
        ([[1.0]], [[1.0, -4.0]], inf),
        ([[[9.0], [1.0], [2.0]]], [[[1.0], [2.5]]], 0.2),  # a prompt's position first
    ],
)
def test_of_the_largest_logit(found, expected, apart) -> None:
    assert _apart(torch.tensor(found), torch.tensor(expected)) == pytest.approx(apart)


def test_no_number_is_no_small_difference() -> None:
    assert not _apart(torch.tensor([[float("nan")]]), torch.tensor([[1.0]])) <= 1e-5
