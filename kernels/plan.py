"""Which rows of a batch belong to which task: built on the host once a batch, read by every layer.

Legend: M rows, S segments (runs of rows of one task), T tasks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """One row space: ``rows`` rows cut into segments, each of one task.

    Args:
        rows: M, the number of rows of ``x`` when it is seen as ``[M, K]``.
        offsets: S + 1 rising row numbers, from 0 to ``rows``; segment ``i`` is ``offsets[i]:offsets[i + 1]``.
        tasks: the task of each segment, an index into the T tasks of the batch. A task may own several
            segments, in any order, or none.
        num_tasks: T.

    Raises:
        ValueError: the numbers do not describe segments.
    """

    rows: int
    offsets: tuple[int, ...]
    tasks: tuple[int, ...]
    num_tasks: int
    _tables: dict[torch.device, list[Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.num_tasks < 1:
            raise ValueError(f"num_tasks is {self.num_tasks}; a plan needs at least one task")
        if len(self.offsets) != len(self.tasks) + 1:
            raise ValueError(
                f"offsets has {len(self.offsets)} entries for {len(self.tasks)} tasks; "
                "give one more offset than segments"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != self.rows:
            raise ValueError(
                f"offsets go from {self.offsets[0]} to {self.offsets[-1]}; "
                f"they must cover rows 0 to {self.rows}"
            )
        for start, end in pairwise(self.offsets):
            if start >= end:
                raise ValueError(f"offsets {start}, {end} do not rise; leave empty segments out")
        for task in self.tasks:
            if not 0 <= task < self.num_tasks:
                raise ValueError(f"tasks holds {task}; it must be in 0..{self.num_tasks - 1} (num_tasks)")

    @classmethod
    def from_sequences(
        cls, task_of_sequence: Sequence[int] | Tensor, rows_per_sequence: int, num_tasks: int
    ) -> Plan:
        """Sequences of equal length, rows ordered by sequence; neighbours of one task become one segment.

        Args:
            task_of_sequence: B task indices, on the host.
            rows_per_sequence: L; 0 gives a plan without rows.
            num_tasks: T.

        Raises:
            ValueError: a task outside ``0..num_tasks - 1``, a negative length, ids that are not integers
                on the host.
        """
        length = operator.index(rows_per_sequence)
        if length < 0:
            raise ValueError(f"rows_per_sequence is {length}; it must be 0 or more")
        runs = _runs(task_of_sequence, "task_of_sequence")
        return cls._from_runs([(task, count * length) for task, count in runs], num_tasks)

    @classmethod
    def from_rows(cls, task_of_row: Sequence[int] | Tensor, num_tasks: int) -> Plan:
        """Packed rows: every run of equal tasks is one segment.

        Args:
            task_of_row: M task indices, on the host.
            num_tasks: T.

        Raises:
            ValueError: a task outside ``0..num_tasks - 1``, ids that are not integers on the host.
        """
        return cls._from_runs(_runs(task_of_row, "task_of_row"), num_tasks)

    @classmethod
    def _from_runs(cls, runs: list[tuple[int, int]], num_tasks: int) -> Plan:
        offsets, tasks = [0], []
        for task, rows in runs:
            if rows:
                tasks.append(task)
                offsets.append(offsets[-1] + rows)
        return cls(offsets[-1], tuple(offsets), tuple(tasks), operator.index(num_tasks))

    def segments(self) -> list[tuple[int, int, int]]:
        """``(task, first row, row after the last)`` of each segment."""
        return [(t, a, b) for t, (a, b) in zip(self.tasks, pairwise(self.offsets), strict=True)]

    def tables(self, device: torch.device | str = HOST) -> tuple[Tensor, Tensor]:
        """``offsets [S + 1]`` and ``tasks [S]``, int32, cached per device; no device sync."""
        offsets, tasks = self.op_tables(device)[1:3]
        return offsets, tasks

    def row_tasks(self, device: torch.device | str = HOST) -> Tensor:
        """The task of each row, int64 ``[M]``, cached per device; no device sync."""
        return self.op_tables(device)[0]

    def op_tables(self, device: torch.device | str = HOST) -> list[Tensor]:
        """What the ops take as ``tables``: row tasks, offsets, tasks on ``device``.

        Off the host, offsets and tasks on the host follow, so that the last two entries can always be read
        without a device sync.
        """
        device = torch.device(device)
        found = self._tables.get(device)
        if found is None:
            offsets = torch.tensor(self.offsets, dtype=torch.int32)
            tasks = torch.tensor(self.tasks, dtype=torch.int32)
            row_tasks = torch.repeat_interleave(tasks.long(), offsets.diff().long(), output_size=self.rows)
            found = [row_tasks, offsets, tasks]
            if device.type != "cpu":
                # non_blocking: a blocking copy would wait for the device.
                found = [t.to(device, non_blocking=True) for t in found] + [offsets, tasks]
            self._tables[device] = found
        return found


def _runs(values: Sequence[int] | Tensor, key: str) -> list[tuple[int, int]]:
    """``(value, length)`` of the runs of equal values."""
    ids = torch.as_tensor(values) if len(values) else torch.empty(0, dtype=torch.int64)
    if ids.device.type != "cpu":
        raise ValueError(f"{key} is on {ids.device}; a plan is built on the host: keep task ids on the CPU")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"{key} has shape {tuple(ids.shape)} and dtype {ids.dtype}; give one list of integers"
        )
    runs, counts = torch.unique_consecutive(ids, return_counts=True)
    return list(zip(runs.tolist(), counts.tolist(), strict=True))
