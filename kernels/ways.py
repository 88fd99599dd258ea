"""Three ways to multiply rows by the experts of their task, in plain torch, and which one costs least.

:class:`Dense` multiplies every row by every expert and lets the gates (zero where a task does not use an
expert) pick; :class:`Segments` walks the plan and gathers the slots of each task; :class:`Equal` does the
same for segments of one length, all of them in one batched product. Each knows the same moves; the ops of
low_rank_cpu.py are made of them.

Legend: M rows, D a wide dimension, E experts, r rank of one expert, T tasks, k slots of a task, R = k*r, C
columns of a way (E*r or R), G 1 or T, S segments, L rows of a segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# In multiply-adds of a large product, measured on one CPU core: columns that a row costs whatever its rank
# (memory traffic), and fewer where one product takes all rows, ...
ROW = 32
WHOLE = 24
# ... what one more segment costs (dispatch, and with several slots a task the gather and the scatter of their
# bank rows), ...
SINGLE = 3 * 2**18
SEVERAL = 5 * 2**19
# ... and an element that is gathered.
GATHER = 24


def choose(sizes: Sequence[int], E: int, k: int, r: int, width: int) -> type[Dense] | type[Segments]:
    """The way that costs least.

    Args:
        sizes: S rows of a segment.
        E, k, r: experts, slots of a task, rank of an expert.
        width: the sum of the wide dimensions that are met.
    """
    cost = costs(len(sizes), sum(sizes), max(sizes, default=0), E, k, r, width)
    return min(cost, key=lambda way: cost[way])


def costs(
    S: int, rows: int, longest: int, E: int, k: int, r: int, width: int
) -> dict[type[Dense] | type[Segments], float]:
    """What each way costs that can be gone, in multiply-adds; ``longest``: rows of the longest segment."""
    cost: dict[type[Dense] | type[Segments], float] = {Dense: rows * width * (E * r + WHOLE)}
    if S:
        once = rows * width * (k * r + ROW)
        cost[Segments] = once + S * (SINGLE if k == 1 else SEVERAL)
        if S * longest == rows:
            cost[Equal] = once + S * k * r * width * GATHER
    return cost


class Dense:
    """Every row times every expert: C = E * r columns."""

    def __init__(
        self, r: int, E: int, slots_Tk: Tensor | None, tables: Sequence[Tensor], acc: torch.dtype
    ) -> None:
        self.r, self.E, self.slots_Tk, self.tables, self.acc = r, E, slots_Tk, tables, acc
        self._columns: Tensor | None = None

    def shrink(self, wide_MD: Tensor, bank_ErD: Tensor) -> Tensor:
        """``wide @ bank^T [M, C]``, in fp32 or better."""
        bank_CD = bank_ErD.to(wide_MD.dtype).flatten(0, 1)
        return torch.mm(wide_MD, bank_CD.t()).to(self.acc)

    def expand(self, h_MC: Tensor, bank_ErD: Tensor, dtype: torch.dtype, y_MD: Tensor | None) -> Tensor:
        """``y + h @ bank [M, D]`` in ``dtype``."""
        h_MC, bank_CD = h_MC.to(dtype), bank_ErD.to(dtype).flatten(0, 1)
        return torch.mm(h_MC, bank_CD) if y_MD is None else torch.addmm(y_MD, h_MC, bank_CD)

    def weight_gradient(self, h_MC: Tensor, wide_MD: Tensor, bank_GErD: Tensor) -> Tensor:
        """``h^T wide`` over all rows (G = 1) or over the rows of each task (G = T), like the bank."""
        wide_MD = wide_MD.to(h_MC.dtype)
        if bank_GErD.shape[0] == 1:
            grad = torch.mm(h_MC.t(), wide_MD)
        else:
            grad = h_MC.new_zeros(bank_GErD.shape[0], h_MC.shape[1], wide_MD.shape[1])
            for t, start, end in _segments(self.tables):
                grad[t].addmm_(h_MC[start:end].t(), wide_MD[start:end])
        return grad.view(bank_GErD.shape).to(bank_GErD.dtype)

    def gates(self, gates_Tk: Tensor, scale: float) -> Tensor:
        """Gates times scale at every row and column, ``[M, C]`` or ``[1, C]``; a column that a task does not
        use gets 0, one that it uses twice the sum."""
        scaled_Tk = gates_Tk.to(self.acc) * scale
        if self.slots_Tk is not None:
            dense = scaled_Tk.new_zeros(scaled_Tk.shape[0], self.E)
            scaled_Tk = dense.scatter_add_(1, self.slots_Tk, scaled_Tk)
        return over_rows(_columns(scaled_Tk, self.r), self.tables)

    def slot_gates(self, gates_Tk: Tensor, scale: float) -> Tensor:
        """Gates times scale at every row and slot's column, ``[M, R]`` or ``[1, R]``."""
        return over_rows(_columns(gates_Tk.to(self.acc) * scale, self.r), self.tables)

    def pick(self, h_MC: Tensor) -> Tensor:
        """``[M, C]`` -> the columns of each row's slots ``[M, R]``."""
        return h_MC if self.slots_Tk is None else h_MC.gather(1, self._slot_columns())

    def place(self, s_MR: Tensor) -> Tensor:
        """``[M, R]`` -> ``[M, C]``: the columns of slots with the same expert added up, zeros elsewhere."""
        if self.slots_Tk is None:
            return s_MR
        return s_MR.new_zeros(s_MR.shape[0], self.E * self.r).scatter_add_(1, self._slot_columns(), s_MR)

    def _slot_columns(self) -> Tensor:
        if self._columns is None:
            assert self.slots_Tk is not None
            within = torch.arange(self.r, device=self.slots_Tk.device)
            columns_Tkr = self.slots_Tk[:, :, None] * self.r + within
            self._columns = columns_Tkr.flatten(1).index_select(0, self.tables[0])
        return self._columns


class Segments:
    """Segment after segment, each times the experts in its task's slots: C = R columns."""

    def __init__(self, r: int, slots_Tk: Tensor, tables: Sequence[Tensor], acc: torch.dtype) -> None:
        self.r, self.slots_Tk, self.tables, self.acc = r, slots_Tk, tables, acc
        self.tasks: list[int] = tables[-1].tolist()
        self.sizes: list[int] = tables[-2].diff().tolist()
        # One slot a task, known on the host: its bank rows are a view, nothing is gathered.
        self.single: list[int] | None = None
        if slots_Tk.shape[1] == 1 and slots_Tk.device.type == "cpu":
            self.single = slots_Tk.flatten().tolist()
            if min(self.single) < 0:
                raise IndexError(f"slots hold {min(self.single)}: index out of range")

    def shrink(self, wide_MD: Tensor, bank_ErD: Tensor) -> Tensor:
        """See :meth:`Dense.shrink`."""
        bank_ErD = bank_ErD.to(wide_MD.dtype)
        out = wide_MD.new_empty(wide_MD.shape[0], self.slots_Tk.shape[1] * self.r)
        for t, wide, rank in self._over(wide_MD, out):
            torch.mm(wide, self._rows(bank_ErD, t).t(), out=rank)
        return out.to(self.acc)

    def expand(self, h_MC: Tensor, bank_ErD: Tensor, dtype: torch.dtype, y_MD: Tensor | None) -> Tensor:
        """See :meth:`Dense.expand`."""
        h_MC, bank_ErD = h_MC.to(dtype), bank_ErD.to(dtype)
        out_MD = h_MC.new_empty(h_MC.shape[0], bank_ErD.shape[2])
        for t, h, y, out in self._over(h_MC, h_MC if y_MD is None else y_MD, out_MD):
            if y_MD is None:
                torch.mm(h, self._rows(bank_ErD, t), out=out)
            else:
                torch.addmm(y, h, self._rows(bank_ErD, t), out=out)
        return out_MD

    def weight_gradient(self, h_MC: Tensor, wide_MD: Tensor, bank_GErD: Tensor) -> Tensor:
        """See :meth:`Dense.weight_gradient`."""
        G, _, r, D = bank_GErD.shape
        grad = h_MC.new_zeros(bank_GErD.shape)
        for t, h, wide in self._over(h_MC, wide_MD.to(h_MC.dtype)):
            into = grad[t if G > 1 else 0]
            if self.single is not None:
                into[self.single[t]].addmm_(h.t(), wide)
            else:
                add_rows_(into, self.slots_Tk[t], torch.mm(h.t(), wide).view(-1, r, D))
        return grad.to(bank_GErD.dtype)

    def gates(self, gates_Tk: Tensor, scale: float) -> Tensor:
        """Gates times scale at every row and column, ``[M, R]`` or ``[1, R]``."""
        return over_rows(_columns(gates_Tk.to(self.acc) * scale, self.r), self.tables)

    slot_gates = gates

    def pick(self, h_MC: Tensor) -> Tensor:
        """Nothing to pick: the columns are those of the slots."""
        return h_MC

    place = pick

    def _over(self, *by_row: Tensor) -> Iterable[tuple[Any, ...]]:
        """``(task, rows of each tensor)`` of each segment."""
        return zip(self.tasks, *(tensor.split_with_sizes(self.sizes) for tensor in by_row), strict=True)

    def _rows(self, bank_ErD: Tensor, t: int) -> Tensor:
        """``[R, D]``, the bank rows of task ``t``."""
        if self.single is not None:
            return bank_ErD[self.single[t]]
        return bank_ErD.index_select(0, self.slots_Tk[t]).flatten(0, 1)


class Equal(Segments):
    """Segments of one length: the three products of all segments at once, as batches of S."""

    def __init__(self, r: int, slots_Tk: Tensor, tables: Sequence[Tensor], acc: torch.dtype) -> None:
        self.r, self.slots_Tk, self.tables, self.acc = r, slots_Tk, tables, acc
        self.slots_Sk = slots_Tk.index_select(0, tables[2])

    def shrink(self, wide_MD: Tensor, bank_ErD: Tensor) -> Tensor:
        """See :meth:`Dense.shrink`."""
        rank_SLR = torch.bmm(self._batch(wide_MD), self._bank(bank_ErD, wide_MD.dtype).transpose(1, 2))
        return rank_SLR.flatten(0, 1).to(self.acc)

    def expand(self, h_MC: Tensor, bank_ErD: Tensor, dtype: torch.dtype, y_MD: Tensor | None) -> Tensor:
        """See :meth:`Dense.expand`."""
        h_SLR, bank_SRD = self._batch(h_MC.to(dtype)), self._bank(bank_ErD, dtype)
        out_MD = h_SLR.new_empty(h_MC.shape[0], bank_SRD.shape[2])  # an op's result is no view
        if y_MD is None:
            torch.bmm(h_SLR, bank_SRD, out=self._batch(out_MD))
        else:
            torch.baddbmm(self._batch(y_MD), h_SLR, bank_SRD, out=self._batch(out_MD))
        return out_MD

    def weight_gradient(self, h_MC: Tensor, wide_MD: Tensor, bank_GErD: Tensor) -> Tensor:
        """See :meth:`Dense.weight_gradient`."""
        G, E, r, D = bank_GErD.shape
        part_SRD = torch.bmm(self._batch(h_MC).transpose(1, 2), self._batch(wide_MD.to(h_MC.dtype)))
        experts_Sk = self.slots_Sk
        if G > 1:
            experts_Sk = experts_Sk + self.tables[2].long()[:, None] * E
        grad = h_MC.new_zeros(G * E, r, D)
        add_rows_(grad, experts_Sk.flatten(), part_SRD.view(-1, r, D))
        return grad.view(bank_GErD.shape).to(bank_GErD.dtype)

    def _batch(self, by_row: Tensor) -> Tensor:
        return by_row.unflatten(0, (len(self.slots_Sk), -1))

    def _bank(self, bank_ErD: Tensor, dtype: torch.dtype) -> Tensor:
        """``[S, R, D]``, the bank rows of each segment."""
        rows = bank_ErD.to(dtype).index_select(0, self.slots_Sk.flatten())
        return rows.view(len(self.slots_Sk), -1, rows.shape[2])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of this dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _segments(tables: Sequence[Tensor]) -> Iterable[tuple[int, int, int]]:
    offsets, tasks = tables[-2].tolist(), tables[-1].tolist()
    return [(t, a, b) for t, (a, b) in zip(tasks, pairwise(offsets), strict=True)]


def _columns(per_slot: Tensor, r: int) -> Tensor:
    """``[T, k]`` repeated over the r columns of each slot: ``[T, k * r]``."""
    return per_slot if r == 1 else per_slot.repeat_interleave(r, dim=1)


def over_rows(per_task_TC: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """A value a task, spread over its rows; one segment broadcasts."""
    if len(tables[-1]) == 1:
        task = int(tables[-1])
        return per_task_TC[task : task + 1]
    return per_task_TC.index_select(0, tables[0])


def add_rows_(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """``into[index] += rows`` in the order of ``index``, repeated indices included."""
    if into.is_cuda:
        into.index_put_((index,), rows, accumulate=True)  # sorts; index_add_ uses atomics there
    else:
        into.index_add_(0, index, rows)
