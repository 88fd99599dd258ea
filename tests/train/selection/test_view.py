"""What taskmoe select prints of groups."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from taskmoe.moe import TaskTable
from taskmoe.train.selection.base import cosines
from taskmoe.train.selection.grouping import group
from taskmoe.train.selection.view import _print_groups


def test_agreement_is_of_as_many_groups_as_the_task_table_has():
    tasks = TaskTable()
    for i in range(6):
        tasks.add(f"t{i}", group=f"g{i % 3}")
    near = torch.eye(3)[torch.arange(6) % 3] + 0.01 * torch.randn(6, 3, generator=torch.Generator())
    page = io.StringIO()
    _print_groups(Console(file=page, width=140), "semb", group(cosines(list(near)), tasks, 2))
    lines = page.getvalue().splitlines()
    assert lines[-1].startswith("cut at 3 groups, as many as the task table has: adjusted Rand index with ")
    assert "its groups 1.00 (p = " in lines[-1]
    assert all(sum(f" t{i} " in line for line in lines) == 1 for i in range(6))
    assert "groups by semb" in page.getvalue() and " 3 " not in "".join(line[:30] for line in lines[:-1])
