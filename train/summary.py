"""What a run prints: what a phase will do and what its mixture means, and how each task ended."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from taskmoe.moe import TaskMoEModel, TaskTable
from taskmoe.train.mixing import expected_epochs
from taskmoe.train.schedule import Phase


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


def controls_table(
    tasks: TaskTable, arms: Mapping[str, Mapping[str, Any]], epochs: Sequence[float]
) -> list[str]:
    """Lines of a table: each task's own metric for each arm (experts, disabled, uniform), and the score.

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


def trained_line(model: TaskMoEModel) -> str:
    """What trains, in numbers; the exact list is ``trainable.txt`` in the run folder."""
    groups = {g: ps for g, ps in model.trainable_groups().items() if ps}
    sizes = {g: sum(getattr(p, "ds_numel", p.numel()) for _, p in ps) for g, ps in groups.items()}
    parts = (
        f"{g} {n:,} in {len(groups[g])} tensor{'s' if len(groups[g]) > 1 else ''}" for g, n in sizes.items()
    )
    return f"trains {', '.join(parts)} (listed in trainable.txt)"


def phase_lines(
    phase: Phase, model: TaskMoEModel, sizes: Sequence[int], shares: Sequence[float], budget: int, beyond: int
) -> list[str]:
    """What a phase will do: what trains, on which mixture.

    Args:
        sizes, shares: rows and share of the mixture of each task.
        budget: rows of the phase; beyond: how many of them UniMax's bound on repeats does not allow.
    """
    lines = [trained_line(model)]
    if model.not_run:
        lines.append(f"no experts on {', '.join(model.not_run)}: a forward pass never runs them")
    lines += epochs_table(model.tasks, sizes, shares, expected_epochs(shares, sizes, budget))
    if beyond:
        lines.append(
            f"mixing.max_epochs: {phase.mixing.max_epochs} allows {budget - beyond} of the {budget} rows of "
            "this phase; all tasks repeat more often"
        )
    return lines
