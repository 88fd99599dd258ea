"""The ops of the grouped low-rank product on the CPU, and wherever no kernel runs.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks, k slots of a task, R = k*r, C
columns of a way (E*r or R), G 1 or T.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from taskmoe.kernels.ways import Dense, Segments, accumulator, add_rows_, choose


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
    way = _way(x_MK, A_GErK, A_GErK.shape[3] + B_GErN.shape[3], slots_Tk, tables)
    h_MC = way.shrink(x_MK, A_GErK[0])
    out_MN = way.expand(h_MC * way.gates(gates_Tk, scale), B_GErN[0], x_MK.dtype, y_MN)
    return out_MN, way.pick(h_MC)


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
    need_x, need_A, need_B, need_gates = needs
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)  # one each: outputs of an op must not alias
    way = _way(x_MK, A_GErK, A_GErK.shape[3] + B_GErN.shape[3], slots_Tk, tables)
    if need_x or need_A or need_gates:
        dh_MC = way.shrink(dy_MN, B_GErN[0])
        ds_MC = dh_MC * way.gates(gates_Tk, scale) if need_x or need_A else dh_MC
        if need_x:
            dx = way.expand(ds_MC, A_GErK[0], x_MK.dtype, None)
        if need_A:
            dA = way.weight_gradient(ds_MC, x_MK, A_GErK)
        if need_gates:
            dgates = gate_gradient(way.pick(dh_MC), s_MR, gates_Tk, scale, tables)
    if need_B:
        dB = way.weight_gradient(way.place(s_MR * way.slot_gates(gates_Tk, scale)), dy_MN, B_GErN)
    return dx, dA, dB, dgates


def shrink_fwd(x_MK: Tensor, A_GErK: Tensor, slots_Tk: Tensor | None, tables: Sequence[Tensor]) -> Tensor:
    """``s [M, R]``, the rows times the experts of their task, in fp32 or better."""
    way = _way(x_MK, A_GErK, A_GErK.shape[3], slots_Tk, tables)
    return way.pick(way.shrink(x_MK, A_GErK[0]))


def shrink_bwd(
    ds_MR: Tensor,
    x_MK: Tensor,
    A_GErK: Tensor,
    slots_Tk: Tensor | None,
    tables: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and A; an empty tensor for each that is not in ``needs``."""
    way = _way(x_MK, A_GErK, A_GErK.shape[3], slots_Tk, tables)
    ds_MC = way.place(ds_MR)
    dx, dA = x_MK.new_empty(0), x_MK.new_empty(0)
    if needs[0]:
        dx = way.expand(ds_MC, A_GErK[0], x_MK.dtype, None)
    if needs[1]:
        dA = way.weight_gradient(ds_MC, x_MK, A_GErK)
    return dx, dA


def expand_fwd(
    s_MR: Tensor,
    y_MN: Tensor | None,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """``y`` and the gated columns of ``s`` times the experts of their task: ``[M, N]`` in ``dtype``."""
    way = _way(s_MR, B_GErN, B_GErN.shape[3], slots_Tk, tables)
    h_MC = way.place(s_MR * way.slot_gates(gates_Tk, scale))
    return way.expand(h_MC, B_GErN[0], dtype, y_MN)


def expand_bwd(
    dy_MN: Tensor,
    s_MR: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of s, B and the gates; an empty tensor for each that is not in ``needs``."""
    way = _way(s_MR, B_GErN, B_GErN.shape[3], slots_Tk, tables)
    gates_MR = way.slot_gates(gates_Tk, scale)
    ds, dB, dgates = (s_MR.new_empty(0) for _ in needs)
    if needs[0] or needs[2]:
        dh_MR = way.pick(way.shrink(dy_MN, B_GErN[0]))
        if needs[0]:
            ds = dh_MR * gates_MR
        if needs[2]:
            dgates = gate_gradient(dh_MR, s_MR, gates_Tk, scale, tables)
    if needs[1]:
        dB = way.weight_gradient(way.place(s_MR * gates_MR), dy_MN, B_GErN)
    return ds, dB, dgates


def _way(
    by_row: Tensor, bank_GErD: Tensor, width: int, slots_Tk: Tensor | None, tables: Sequence[Tensor]
) -> Dense | Segments:
    """The way that costs least for this shape; ``width``: the sum of the wide dimensions met."""
    _, E, r, _ = bank_GErD.shape
    acc = accumulator(by_row.dtype)
    if slots_Tk is not None:
        sizes = [end - start for start, end in pairwise(tables[-2].tolist())]
        way = choose(sizes, E, slots_Tk.shape[1], r, width)
        if issubclass(way, Segments):
            return way(r, slots_Tk, tables, acc)
    return Dense(r, E, slots_Tk, tables, acc)


def gate_gradient(
    dh_MR: Tensor, s_MR: Tensor, gates_Tk: Tensor, scale: float, tables: Sequence[Tensor]
) -> Tensor:
    """``scale * <dh, s>`` over the rows of each task and the columns of each slot, ``[T, k]``."""
    T, k = gates_Tk.shape
    R = s_MR.shape[1]
    grad_TR = dh_MR.new_zeros(T, R)
    add_rows_(grad_TR, tables[0], dh_MR * s_MR)
    return (grad_TR.view(T, k, R // k).sum(-1) * scale).to(gates_Tk.dtype)
