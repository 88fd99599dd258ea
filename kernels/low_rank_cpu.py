"""The grouped low-rank product in plain torch matmuls: what runs on the CPU, and wherever no kernel does.

Two ways, chosen by shape: *dense* multiplies every row by every expert and lets the gates (zero where a task
does not use an expert) pick; *segments* walks the plan and gathers the slots of each task.

Legend: M rows, K d_in, N d_out, D either, E experts, r rank of one expert, C = E*r bank rows, T tasks,
k slots of a task, R = k*r, G 1 or T, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# What one more segment costs in multiply-adds, measured on one CPU core: dispatch, and with several slots a
# task the gather and the scatter of their bank rows.
SEGMENT_COST_SINGLE = 2**19
SEGMENT_COST = 2**21


def use_segments(rows: int, segments: int, experts: int, slots: int, r: int, width: int) -> bool:
    """Whether walking the segments costs less than multiplying every row by every expert."""
    cost = SEGMENT_COST_SINGLE if slots == 1 else SEGMENT_COST
    return segments * cost < rows * (experts - slots) * r * width


def low_rank_fwd(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The sum of ``y`` and the gated experts ``[M, N]``, and the ungated rank-space product ``s [M, R]``."""
    E, r = A_GErK.shape[1:3]
    acc = _accumulator(x_MK.dtype)
    A_ErK, B_ErN = A_GErK[0].to(x_MK.dtype), B_GErN[0].to(x_MK.dtype)
    scaled_Tk = gates_Tk.to(acc) * scale
    if slots_Tk is not None and _walk(x_MK, A_GErK, B_GErN, slots_Tk, tables):
        segments = _Segments(slots_Tk, tables)
        s_MR = x_MK.new_empty(x_MK.shape[0], slots_Tk.shape[1] * r)
        for t, x, s in segments.over(x_MK, s_MR):
            torch.mm(x, segments.rows(A_ErK, t).t(), out=s)
        s_MR = s_MR.to(acc)
        h_MR = (s_MR * _over_rows(_columns(scaled_Tk, r), tables)).to(x_MK.dtype)
        out_MN = x_MK.new_empty(x_MK.shape[0], B_ErN.shape[2])
        for t, h, y, out in segments.over(h_MR, h_MR if y_MN is None else y_MN, out_MN):
            if y_MN is None:
                torch.mm(h, segments.rows(B_ErN, t), out=out)
            else:
                torch.addmm(y, h, segments.rows(B_ErN, t), out=out)
        return out_MN, s_MR
    s_MC = torch.mm(x_MK, A_ErK.reshape(E * r, -1).t()).to(acc)
    s_MR = s_MC
    if slots_Tk is not None:
        scaled_Tk = _dense_gates(scaled_Tk, slots_Tk, E)
        s_MR = s_MC.gather(1, _slot_columns(slots_Tk, r, tables))
    h_MC = (s_MC * _over_rows(_columns(scaled_Tk, r), tables)).to(x_MK.dtype)
    B_CN = B_ErN.reshape(E * r, -1)
    return (torch.mm(h_MC, B_CN) if y_MN is None else torch.addmm(y_MN, h_MC, B_CN)), s_MR


def low_rank_bwd(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MR: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B and the gates; an empty tensor for each that is not in ``needs``."""
    E, r = A_GErK.shape[1:3]
    acc = _accumulator(x_MK.dtype)
    need_x, need_A, need_B, need_gates = needs
    need_dh = need_x or need_A or need_gates
    A_ErK, B_ErN = A_GErK[0].to(x_MK.dtype), B_GErN[0].to(x_MK.dtype)
    scaled_Tk = gates_Tk.to(acc) * scale
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)  # one each: outputs of an op must not alias

    if slots_Tk is not None and _walk(x_MK, A_GErK, B_GErN, slots_Tk, tables):
        segments = _Segments(slots_Tk, tables)
        gates_MR = _over_rows(_columns(scaled_Tk, r), tables)
        if need_dh:
            dh_MR = x_MK.new_empty(s_MR.shape)
            for t, dy, dh in segments.over(dy_MN, dh_MR):
                torch.mm(dy, segments.rows(B_ErN, t).t(), out=dh)
            dh_MR = dh_MR.to(acc)
            ds_MR = dh_MR * gates_MR
        if need_x:
            dx = x_MK.new_empty(x_MK.shape)
            for t, ds, dx_rows in segments.over(ds_MR.to(x_MK.dtype), dx):
                torch.mm(ds, segments.rows(A_ErK, t), out=dx_rows)
        if need_A:
            dA = segments.weight_gradient(ds_MR, x_MK, A_GErK)
        if need_B:
            dB = segments.weight_gradient(s_MR * gates_MR, dy_MN, B_GErN)
        if need_gates:
            dgates = _gate_gradient(dh_MR, s_MR, gates_Tk, scale, tables)
        return dx, dA, dB, dgates

    columns_MR: Tensor | None = None
    s_MC = s_MR
    if slots_Tk is not None:
        columns_MR = _slot_columns(slots_Tk, r, tables)
        scaled_Tk = _dense_gates(scaled_Tk, slots_Tk, E)
        # Columns outside a task's slots meet a gate of zero.
        s_MC = s_MR.new_zeros(s_MR.shape[0], E * r).scatter_(1, columns_MR, s_MR)
    gates_MC = _over_rows(_columns(scaled_Tk, r), tables)
    if need_dh:
        dh_MC = torch.mm(dy_MN, B_ErN.reshape(E * r, -1).t()).to(acc)
        ds_MC = dh_MC * gates_MC
    if need_x:
        dx = torch.mm(ds_MC.to(x_MK.dtype), A_ErK.reshape(E * r, -1))
    if need_A:
        dA = _weight_gradient(ds_MC, x_MK, A_GErK, tables)
    if need_B:
        dB = _weight_gradient(s_MC * gates_MC, dy_MN, B_GErN, tables)
    if need_gates:
        dh_MR = dh_MC if columns_MR is None else dh_MC.gather(1, columns_MR)
        dgates = _gate_gradient(dh_MR, s_MR, gates_Tk, scale, tables)
    return dx, dA, dB, dgates


class _Segments:
    """The segments of the plan, and the bank rows that each task's slots name."""

    def __init__(self, slots_Tk: Tensor, tables: Sequence[Tensor]) -> None:
        self.slots_Tk = slots_Tk
        self.tasks: list[int] = tables[-1].tolist()
        self.sizes: list[int] = tables[-2].diff().tolist()
        # One slot a task, known on the host: its bank rows are a view, nothing is gathered.
        self.single: list[int] | None = None
        if slots_Tk.shape[1] == 1 and slots_Tk.device.type == "cpu":
            self.single = slots_Tk.flatten().tolist()
            if min(self.single) < 0:
                raise IndexError(f"slots hold {min(self.single)}: index out of range")

    def over(self, *by_row: Tensor) -> Iterable[tuple[Any, ...]]:
        """``(task, rows of each tensor)`` of each segment."""
        return zip(self.tasks, *(tensor.split_with_sizes(self.sizes) for tensor in by_row), strict=True)

    def rows(self, bank_ErD: Tensor, t: int) -> Tensor:
        """``[R, D]``, the bank rows of task ``t``."""
        if self.single is not None:
            return bank_ErD[self.single[t]]
        return bank_ErD.index_select(0, self.slots_Tk[t]).flatten(0, 1)

    def weight_gradient(self, h_MR: Tensor, wide_MD: Tensor, bank_GErD: Tensor) -> Tensor:
        """``h^T wide`` over the rows of each task, added to the experts of its slots; the bank's dtype."""
        G, _, r, D = bank_GErD.shape
        grad = h_MR.new_zeros(bank_GErD.shape)
        for t, h, wide in self.over(h_MR, wide_MD.to(h_MR.dtype)):
            into = grad[t if G > 1 else 0]
            if self.single is not None:
                into[self.single[t]].addmm_(h.t(), wide)
            else:
                _add_rows_(into, self.slots_Tk[t], torch.mm(h.t(), wide).view(-1, r, D))
        return grad.to(bank_GErD.dtype)


def _walk(x_MK: Tensor, A_GErK: Tensor, B_GErN: Tensor, slots_Tk: Tensor, tables: Sequence[Tensor]) -> bool:
    (E, r, K), N = A_GErK.shape[1:], B_GErN.shape[3]
    return use_segments(x_MK.shape[0], len(tables[-1]), E, slots_Tk.shape[1], r, K + N)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _segments(tables: Sequence[Tensor]) -> Iterable[tuple[int, int, int]]:
    offsets, tasks = tables[-2].tolist(), tables[-1].tolist()
    return [(t, a, b) for t, (a, b) in zip(tasks, pairwise(offsets), strict=True)]


def _columns(per_slot: Tensor, r: int) -> Tensor:
    """``[T, k]`` repeated over the r columns of each slot: ``[T, k * r]``."""
    return per_slot if r == 1 else per_slot.repeat_interleave(r, dim=1)


def _over_rows(per_task_TC: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """A value a task, spread over its rows; one segment broadcasts."""
    if len(tables[-1]) == 1:
        task = int(tables[-1])
        return per_task_TC[task : task + 1]
    return per_task_TC.index_select(0, tables[0])


def _dense_gates(gates_Tk: Tensor, slots_Tk: Tensor, E: int) -> Tensor:
    """``[T, E]``; an expert in two slots of a task gets the sum of their gates."""
    return gates_Tk.new_zeros(gates_Tk.shape[0], E).scatter_add_(1, slots_Tk, gates_Tk)


def _slot_columns(slots_Tk: Tensor, r: int, tables: Sequence[Tensor]) -> Tensor:
    """For each row, the bank rows of its task's slots ``[M, R]``."""
    columns_Tkr = slots_Tk[:, :, None] * r + torch.arange(r, device=slots_Tk.device)
    return columns_Tkr.flatten(1).index_select(0, tables[0])


def _weight_gradient(h_MC: Tensor, wide_MD: Tensor, bank_GErD: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """``h^T wide`` over all rows (G = 1) or over the rows of each task (G = T), in the bank's dtype."""
    wide_MD = wide_MD.to(h_MC.dtype)
    if bank_GErD.shape[0] == 1:
        grad = torch.mm(h_MC.t(), wide_MD)
    else:
        grad = h_MC.new_zeros(bank_GErD.shape[0], h_MC.shape[1], wide_MD.shape[1])
        for t, start, end in _segments(tables):
            grad[t].addmm_(h_MC[start:end].t(), wide_MD[start:end])
    return grad.view(bank_GErD.shape).to(bank_GErD.dtype)


def _gate_gradient(
    dh_MR: Tensor, s_MR: Tensor, gates_Tk: Tensor, scale: float, tables: Sequence[Tensor]
) -> Tensor:
    """``scale * <dh, s>`` over the rows of each task and the columns of each slot, ``[T, k]``."""
    T, k = gates_Tk.shape
    grad = dh_MR.new_zeros(T, k)
    if len(tables[-1]):
        per_segment = torch.segment_reduce(dh_MR * s_MR, "sum", offsets=tables[1].long(), axis=0)
        _add_rows_(grad, tables[2].long(), per_segment.view(per_segment.shape[0], k, -1).sum(-1) * scale)
    return grad.to(gates_Tk.dtype)


def _add_rows_(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """``into[index] += rows`` in the order of ``index``, repeated indices included."""
    if into.is_cuda:
        into.index_put_((index,), rows, accumulate=True)  # sorts; index_add_ uses atomics there
    else:
        into.index_add_(0, index, rows)
