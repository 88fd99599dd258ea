"""What tables and images are drawn from, at one moment of a run.

Legend: R rows of the matrix of cosines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable


@dataclass(frozen=True)
class Media:
    """Plain values on the CPU; what is None, or a snapshot of level ``none``, draws nothing.

    snapshot, first: the routing now, and at the start of the run. conflict: (rows, [R, R] cosines of their
    gradients), as ``grad/rows`` and ``grad/cosine_matrix`` of the log; a row is the slugs of the tasks that
    share it. results: of the last evaluation, as :func:`taskmoe.train.evaluate.evaluate` returns them.
    """

    tasks: TaskTable
    snapshot: Snapshot | None = None
    first: Snapshot | None = None
    conflict: tuple[Sequence[Sequence[str]], Sequence[Sequence[float]]] | None = None
    results: Mapping[str, Any] | None = None
