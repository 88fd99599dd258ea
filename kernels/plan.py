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


def tile_rows(rows: int, segments: int) -> int:
    """Rows of a tile: about as many as a segment has, and enough tiles to keep every core of a GPU busy."""
    size = 16
    while size < 64 and size * segments < rows and size * 128 < rows:
        size *= 2
    return size


def chunk_rows(rows: int) -> int:
    """Rows of a chunk, a power of two in 128..1024. By a formula, not by tuning: it sets the order of
    sums."""
    size = 128
    while size < 1024 and size * 64 <= rows:
        size *= 2
    return size


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
    longest: int = field(default=0, init=False, repr=False, compare=False)  # rows of the longest segment
    _tables: dict[tuple[torch.device, bool], list[Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _padded: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

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
        longest = max((end - start for start, end in pairwise(self.offsets)), default=0)
        object.__setattr__(self, "longest", longest)

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

    def padded(self) -> Tensor:
        """Where each row stands once every segment has ``longest`` rows: int64 ``[M]`` on the host."""
        if not self._padded:
            offsets = torch.tensor(self.offsets)
            shift = torch.arange(len(self.tasks)) * self.longest - offsets[:-1]
            self._padded.append(torch.arange(self.rows) + shift.repeat_interleave(offsets.diff()))
        return self._padded[0]

    def op_tables(self, device: torch.device | str = HOST, *, tiles: bool | None = None) -> list[Tensor]:
        """What the ops take as ``tables``, cached per device; no device sync.

        Row tasks, offsets and tasks on ``device``; with ``tiles`` (default: off the host) what the Triton
        kernels
        walk: ``tiles [n, 3]``, ``chunks [c, 3]`` and ``chunk_ptr [T + 1]``, see :func:`cut`. Wherever those
        are, the last two entries are offsets and tasks on the host, to be read without a sync.
        """
        device = torch.device(device)
        tiles = device.type != "cpu" if tiles is None else tiles
        found = self._tables.get((device, tiles))
        if found is None:
            offsets = torch.tensor(self.offsets, dtype=torch.int32)
            tasks = torch.tensor(self.tasks, dtype=torch.int32)
            small = [offsets, tasks]
            if tiles:
                order = torch.argsort(tasks, stable=True)
                starts, sizes = offsets[:-1], offsets.diff()
                chunks, _ = cut(tasks[order], starts[order], sizes[order], chunk_rows(self.rows))
                chunk_ptr = torch.searchsorted(chunks[:, 0].contiguous(), torch.arange(self.num_tasks + 1))
                small.append(cut(tasks, starts, sizes, tile_rows(self.rows, len(tasks)))[0])
                small += [chunks, chunk_ptr.int()]
            # A few numbers a segment and tile: a blocking copy, or one of a number a row, would wait for the
            # device.
            small = [t.to(device, non_blocking=True) for t in small]
            row_tasks = torch.repeat_interleave(
                small[1].long(), small[0].diff().long(), output_size=self.rows
            )
            found = [row_tasks, *small]
            if tiles or device.type != "cpu":
                found += [offsets, tasks]
            self._tables[device, tiles] = found
        return found


def cut(
    groups: Tensor, starts: Tensor, sizes: Tensor, size: int, pieces: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cut runs of rows into pieces of at most ``size`` rows that never straddle a run.

    Args:
        groups, starts, sizes: int [S], the group, first row and length of each run.
        size: rows of a piece.
        pieces: how many pieces there are; None asks the values (a sync on a device). More than there are: the
            surplus is empty.

    Returns:
        int32 ``[pieces, 3]``, (group, first row, row after the last) in the order of the runs, empty pieces
        with last = first; int32 ``[S + 1]``, where the pieces of each run begin.
    """
    sizes = sizes.long()
    begins = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum((sizes + (size - 1)) // size, 0, out=begins[1:])
    if pieces is None:
        pieces = int(begins[-1])
    piece = torch.arange(pieces, device=sizes.device)
    run = torch.searchsorted(begins, piece, right=True) - 1
    beyond = run >= len(sizes)
    run = run.clamp(max=max(len(sizes) - 1, 0))
    if not len(sizes):
        return torch.zeros(pieces, 3, dtype=torch.int32, device=sizes.device), begins.int()
    first = starts[run] + (piece - begins[run]) * size
    end = torch.minimum(first + size, starts[run] + sizes[run])
    end = torch.where(beyond, first, end)
    return torch.stack([groups[run].long(), first, end], dim=1).int(), begins.int()


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
