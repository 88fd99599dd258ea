"""The grouped low-rank product in plain torch matmuls: what runs on the CPU, and wherever no kernel does.

Two ways, chosen by shape: *dense* multiplies every row by every expert and lets the gates (zero where a task
does not use an expert) pick; *segments* walks the plan and gathers the slots of each task.

Legend: M rows, K d_in, N d_out, D either, E experts, r rank of one expert, C = E*r bank rows, T tasks,
k slots of a task, R = k*r, G 1 or T, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# What one more segment costs (dispatch, gather, scatter), in multiply-adds; measured on one CPU core.
SEGMENT_COST = 2**21


def use_segments(rows: int, segments: int, experts: int, slots: int, r: int, width: int) -> bool:
    """Whether walking the segments costs less than multiplying every row by every expert."""
    return segments * SEGMENT_COST < rows * (experts - slots) * r * width


def _walk(slots_Tk: Tensor, A_GErK: Tensor, B_GErN: Tensor, M: int, tables: Sequence[Tensor]) -> bool:
    (E, r, K), N = A_GErK.shape[1:], B_GErN.shape[3]
    return use_segments(M, len(tables[-1]), E, slots_Tk.shape[1], r, K + N)


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
    M, (E, r) = x_MK.shape[0], A_GErK.shape[1:3]
    acc = _accumulator(x_MK.dtype)
    A_ErK, B_ErN = A_GErK[0].to(x_MK.dtype), B_GErN[0].to(x_MK.dtype)
    gates_TR = _columns(gates_Tk.to(acc) * scale, r)
    if slots_Tk is not None and _walk(slots_Tk, A_GErK, B_GErN, M, tables):
        s_MR = x_MK.new_empty(M, slots_Tk.shape[1] * r)
        out_MN = x_MK.new_empty(M, B_ErN.shape[2])
        gathered = _Gathered(slots_Tk, A_ErK, B_ErN)
        for t, start, end in _segments(tables):
            A_RK, B_RN = gathered[t]
            torch.mm(x_MK[start:end], A_RK.t(), out=s_MR[start:end])
            h = (s_MR[start:end] * gates_TR[t]).to(x_MK.dtype)
            if y_MN is None:
                torch.mm(h, B_RN, out=out_MN[start:end])
            else:
                torch.addmm(y_MN[start:end], h, B_RN, out=out_MN[start:end])
        return out_MN, s_MR.to(acc)
    s_MC = torch.mm(x_MK, A_ErK.reshape(E * r, -1).t()).to(acc)
    if slots_Tk is None:
        gates_TC, s_MR = gates_TR, s_MC
    else:
        gates_TC = _columns(_dense_gates(gates_Tk.to(acc) * scale, slots_Tk, E), r)
        s_MR = s_MC.gather(1, _slot_columns(slots_Tk, r, tables))
    h_MC = (s_MC * _over_rows(gates_TC, tables)).to(x_MK.dtype)
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
    M, (G, E, r) = x_MK.shape[0], A_GErK.shape[:3]
    acc = _accumulator(x_MK.dtype)
    need_x, need_A, need_B, need_gates = needs
    A_ErK, B_ErN = A_GErK[0].to(x_MK.dtype), B_GErN[0].to(x_MK.dtype)
    gates_TR = _columns(gates_Tk.to(acc) * scale, r)
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)  # one each: outputs of an op must not alias

    if slots_Tk is not None and _walk(slots_Tk, A_GErK, B_GErN, M, tables):
        gathered = _Gathered(slots_Tk, A_ErK, B_ErN)
        dh_MR = torch.empty_like(s_MR)
        dx = x_MK.new_empty(x_MK.shape) if need_x else dx
        dA = A_GErK.new_zeros(A_GErK.shape, dtype=acc) if need_A else dA
        dB = B_GErN.new_zeros(B_GErN.shape, dtype=acc) if need_B else dB
        for t, start, end in _segments(tables):
            A_RK, B_RN = gathered[t]
            rows, task = slice(start, end), t if G > 1 else 0
            if need_x or need_A or need_gates:
                dh_MR[rows] = torch.mm(dy_MN[rows], B_RN.t())
            ds = dh_MR[rows] * gates_TR[t]
            if need_x:
                torch.mm(ds.to(x_MK.dtype), A_RK, out=dx[rows])
            if need_A:
                part = torch.mm(ds.t(), x_MK[rows].to(acc))
                _add_rows_(dA[task], slots_Tk[t], part.view(-1, r, part.shape[1]))
            if need_B:
                part = torch.mm((s_MR[rows] * gates_TR[t]).t(), dy_MN[rows].to(acc))
                _add_rows_(dB[task], slots_Tk[t], part.view(-1, r, part.shape[1]))
        dA = dA.to(A_GErK.dtype) if need_A else dA
        dB = dB.to(B_GErN.dtype) if need_B else dB
        if need_gates:
            dgates = _gate_gradient(dh_MR, s_MR, gates_Tk, scale, tables)
        return dx, dA, dB, dgates

    columns_MR: Tensor | None = None
    gates_TC, s_MC = gates_TR, s_MR
    if slots_Tk is not None:
        columns_MR = _slot_columns(slots_Tk, r, tables)
        gates_TC = _columns(_dense_gates(gates_Tk.to(acc) * scale, slots_Tk, E), r)
        # Columns outside a task's slots meet a gate of zero.
        s_MC = s_MR.new_zeros(M, E * r).scatter_(1, columns_MR, s_MR)
    gates_MC = _over_rows(gates_TC, tables)
    if need_x or need_A or need_gates:
        dh_MC = torch.mm(dy_MN, B_ErN.reshape(E * r, -1).t()).to(acc)
        if need_x or need_A:
            ds_MC = dh_MC * gates_MC
        if need_x:
            dx = torch.mm(ds_MC.to(x_MK.dtype), A_ErK.reshape(E * r, -1))
        if need_A:
            dA = _weight_gradient(ds_MC, x_MK, A_GErK, tables)
        if need_gates:
            dh_MR = dh_MC if columns_MR is None else dh_MC.gather(1, columns_MR)
            dgates = _gate_gradient(dh_MR, s_MR, gates_Tk, scale, tables)
    if need_B:
        dB = _weight_gradient(s_MC * gates_MC, dy_MN, B_GErN, tables)
    return dx, dA, dB, dgates


class _Gathered(dict[int, tuple[Tensor, Tensor]]):
    """The bank rows of each task's slots, gathered once a task."""

    def __init__(self, slots_Tk: Tensor, A_ErK: Tensor, B_ErN: Tensor) -> None:
        super().__init__()
        self.slots_Tk, self.banks = slots_Tk, (A_ErK, B_ErN)

    def __missing__(self, t: int) -> tuple[Tensor, Tensor]:
        A, B = (bank.index_select(0, self.slots_Tk[t]).flatten(0, 1) for bank in self.banks)
        self[t] = A, B
        return A, B


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
