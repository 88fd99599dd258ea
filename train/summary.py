"""The two tables a run prints: what the mixture means, and how each task ended."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from taskmoe.moe.tasks import TaskTable


def _lines(table: Table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=110, no_color=True).print(table)
    return [line.rstrip() for line in text.getvalue().rstrip().splitlines()]


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def epochs_table(
    tasks: TaskTable, sizes: Sequence[int], shares: Sequence[float], epochs: Sequence[float], most: int = 40
) -> list[str]:
    """Lines of a table: rows, share of the mixture and expected epochs of each task (the first ``most``)."""
    table = _table("mixture", "task", ["rows", "share", "epochs"])
    for task, size, share, n in list(zip(tasks, sizes, shares, epochs, strict=True))[:most]:
        table.add_row(task.name, f"{size:,}", f"{share:.4f}", f"{n:.2f}")
    lines = _lines(table)
    return lines if len(tasks) <= most else [*lines, f"... and {len(tasks) - most} more tasks"]


def controls_table(tasks: TaskTable, arms: Mapping[str, Mapping[str, Any]], epochs: Sequence[float]) -> list[str]:
    """Lines of a table: the primary metric of each task for each arm (experts, disabled, uniform), and the score.

    Args:
        arms: {arm: result of ``evaluate``}.
        epochs: times each task's training rows were seen.
    """
    table = _table("evaluation", "task", ["metric", *arms, "epochs"])
    first = next(iter(arms.values()))
    for i, task in enumerate(tasks):
        if task.name in first["tasks"]:
            metric = first["tasks"][task.name]["metric"]
            values = [f"{arm['tasks'][task.name][metric]:.3f}" for arm in arms.values()]
            table.add_row(task.name, metric, *values, f"{epochs[i]:.2f}")
    table.add_section()
    table.add_row("score", "", *[f"{arm['score']:.3f}" for arm in arms.values()], "")
    return _lines(table)
