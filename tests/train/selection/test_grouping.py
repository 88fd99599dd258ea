"""Groups of tasks: planted ones are found, memberships are those of fuzzy c-means."""

from __future__ import annotations

import math

import pytest
import torch

from taskmoe.moe import TaskTable
from taskmoe.train.selection.base import SelectError, cosines
from taskmoe.train.selection.grouping import FUZZINESS, group, memberships


def tasks_of(*groups):
    table = TaskTable()
    for i, name in enumerate(groups):
        table.add(f"t{i}", group=name)
    return table


def planted(count=9, spread=0.3):
    draw = torch.Generator().manual_seed(0)
    return [torch.eye(5)[i % 3] + spread * torch.randn(5, generator=draw) for i in range(count)]


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_planted_groups_are_found_whatever_the_unit(scale):
    tasks = tasks_of(*(f"g{i % 3}" for i in range(9)))
    found = group(scale * cosines(planted()), tasks, 3)
    assert found.agreement is not None and found.agreement["adjusted_rand_index"] == 1
    for i in range(9):
        assert found.label[f"t{i}"] == found.label[f"t{i % 3}"]
        row = found.membership[f"t{i}"]
        assert abs(sum(row) - 1) < 1e-12 and max(range(3), key=row.__getitem__) == found.label[f"t{i}"]
    assert len({found.label[f"t{i}"] for i in range(3)}) == 3


def test_memberships_are_of_fuzzy_c_means_with_the_groups_means():
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    for fuzziness in (2.0, FUZZINESS):
        centres = torch.stack([points[labels == c].mean(0) for c in range(3)])
        u = torch.cdist(points, centres) ** (-2 / (fuzziness - 1))
        found = memberships(torch.cdist(points, points).square(), labels, fuzziness)
        assert torch.allclose(found, u / u.sum(1, keepdim=True), atol=1e-9)
    alone = memberships(torch.tensor([[0.0, 4.0], [4.0, 0.0]], dtype=torch.float64), torch.tensor([0, 1]))
    assert torch.allclose(alone, torch.eye(2, dtype=torch.float64))


def test_a_task_of_which_nothing_is_known_is_in_no_group():
    S_TT = cosines(planted(4))
    S_TT[1] = S_TT[:, 1] = math.nan
    found = group(S_TT, tasks_of(None, None, None, None), 3)
    assert found.label["t1"] == -1 and "t1" not in found.membership and found.agreement is None
    assert found.label["t0"] == found.label["t3"] or len(set(found.label.values())) == 4
    assert all(len(row) == 3 and abs(sum(row) - 1) < 1e-12 for row in found.membership.values())
    nothing = group(torch.full((2, 2), math.nan, dtype=torch.float64), tasks_of(None, None), 2)
    assert set(nothing.label.values()) == {-1} and nothing.membership == {}


def test_tasks_that_are_equal_are_one_group_and_numbers_are_checked():
    found = group(torch.ones(3, 3, dtype=torch.float64), tasks_of(None, None, None), 2)
    assert set(found.label.values()) == {0} and list(found.membership.values()) == [[1.0]] * 3
    with pytest.raises(SelectError, match="--group: 4 groups of 3 tasks; give a number from 1 to 3"):
        group(torch.eye(3, dtype=torch.float64), tasks_of(None, None, None), 4)
