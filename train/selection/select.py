"""``taskmoe select``: rank the tasks that may help a target, score the ranking, group tasks.

Legend: T tasks.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from taskmoe.train.selection.base import Options, SelectError, Subject, read_subject
from taskmoe.train.selection.divergence import MEASURES
from taskmoe.train.selection.grouping import Groups, group
from taskmoe.train.selection.kinds import METHODS
from taskmoe.train.selection.scores import read_transfer, score

ALL = "all"


@dataclass(frozen=True)
class Selection:
    """rankings: {method: {target: [(source, affinity), best first]}}, an affinity that is not known is NaN,
    and stands last. scores: {method: numbers of :func:`taskmoe.train.selection.scores.score`}. groups:
    {method: its groups}. tasks: names of all that were compared."""

    tasks: list[str]
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, Groups] = field(default_factory=dict)


def select(
    path: str,
    overrides: Sequence[str],
    methods: Sequence[str],
    *,
    target: str | None = None,
    count: int | None = None,
    matrix: str | None = None,
    options: Options | None = None,
) -> Selection:
    """Compare the tasks of a run, or of a file of settings, by each of ``methods``.

    Args:
        overrides: settings as on a command line.
        target: a task, or ``all`` for each in turn; None: none is ranked.
        count: of groups; None: tasks are not grouped.
        matrix: a file of measured transfer, see :func:`~taskmoe.train.selection.scores.read_transfer`.

    Raises:
        SelectError: an unknown method or measure, an option that nothing reads, a method that cannot compare
            these tasks; fewer than two tasks.
        TaskError: an unknown target; names the nearest.
        ConfigError, CheckpointError, StateError, DataError: what cannot be read.
    """
    options = options or Options()
    _check(methods, count, target, matrix, options)
    config, run = read_subject(path, overrides)
    reads = any(METHODS[method].reads_rows for method in methods)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} tasks read")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        subject = Subject(
            config, run, options, reads=reads, targets=None if target in (None, ALL) else [target]
        )
        if len(subject.names) < 2:
            raise SelectError(f"{path}: there is one task, and nothing to compare it with")
        transfer = None if matrix is None else read_transfer(matrix, subject.tasks)
        found = Selection(subject.names)
        for method in methods:
            bar = progress.add_task(method, total=None)
            subject.advance = lambda bar=bar: progress.advance(bar)  # type: ignore[misc]
            affinity_TT = METHODS[method].affinity(subject)
            progress.remove_task(bar)
            if target is not None:
                found.rankings[method] = {
                    subject.names[t]: ranking(affinity_TT[t], subject.names, t) for t in subject.targets
                }
            if transfer is not None:
                orders = {t: [s for s, _ in row] for t, row in found.rankings[method].items()}
                found.scores[method] = score(transfer, orders)
            if count is not None:
                found.groups[method] = group(affinity_TT, subject.tasks, count)
    return found


def ranking(affinity_T: Tensor, names: Sequence[str], target: int) -> list[tuple[str, float]]:
    """[(source, affinity)] of all tasks but the target, the largest first; equal ones in the tasks' order."""
    values = affinity_T.tolist()
    sources = [s for s in range(len(names)) if s != target]
    sources.sort(key=lambda s: (math.isnan(values[s]), -values[s] if values[s] == values[s] else 0.0))
    return [(names[s], values[s]) for s in sources]


def _check(
    methods: Sequence[str], count: int | None, target: str | None, matrix: str | None, options: Options
) -> None:
    for method in methods:
        if method not in METHODS:
            raise SelectError(_unknown("--method", method, METHODS))
        if count is not None and not METHODS[method].symmetric:
            able = ", ".join(name for name, m in METHODS.items() if m.symmetric)
            raise SelectError(f"--group: {method} says nothing of pairs that holds both ways; use {able}")
    if options.measure not in MEASURES:
        raise SelectError(_unknown("--measure", options.measure, MEASURES))
    if matrix is not None and target is None:
        raise SelectError("--matrix: it scores rankings; give --target TASK, or --target all")
    plain, given = Options(), ", ".join(methods)
    for name in asdict(plain):
        if getattr(options, name) != getattr(plain, name):
            readers = [method for method, m in METHODS.items() if name in m.options]
            if not set(methods) & set(readers):
                raise SelectError(
                    f"--{name}: {given} does not read it; leave it out, or use {', '.join(readers)}"
                )


def _unknown(option: str, found: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.0)[0]
    return f"{option}: {found!r} is not one of {', '.join(known)}; the nearest is {near!r}"
