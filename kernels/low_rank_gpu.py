"""The ops as sequences of Triton kernels; the same signatures as in low_rank_cpu.py.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks, k slots of a task, R = k*r, G 1 or
T, P = M*k pairs of a token and one of its experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskmoe.kernels.launch import Rows, expand, gate_gradient, shrink, weight_gradient


def low_rank_fwd(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """See :func:`taskmoe.kernels.low_rank_cpu.low_rank_fwd`."""
    rows = Rows.of_plan(tables)
    s_MR = shrink(x_MK, A_GErK[0], slots_Tk, rows, len(x_MK))
    return expand(s_MR, gates_Tk, B_GErN[0], slots_Tk, scale, rows, x_MK, y_MN), s_MR


def low_rank_bwd(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MR: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`taskmoe.kernels.low_rank_cpu.low_rank_bwd`."""
    rows = Rows.of_plan(tables)
    return _backward(dy_MN, x_MK, s_MR, A_GErK, B_GErN, gates_Tk, slots_Tk, scale, rows, needs)


def shrink_fwd(x_MK: Tensor, A_GErK: Tensor, slots_Tk: Tensor | None, tables: list[Tensor]) -> Tensor:
    """See :func:`taskmoe.kernels.low_rank_cpu.shrink_fwd`."""
    return shrink(x_MK, A_GErK[0], slots_Tk, Rows.of_plan(tables), len(x_MK))


def shrink_bwd(
    ds_MR: Tensor,
    x_MK: Tensor,
    A_GErK: Tensor,
    slots_Tk: Tensor | None,
    tables: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """See :func:`taskmoe.kernels.low_rank_cpu.shrink_bwd`."""
    rows, bank = Rows.of_plan(tables), A_GErK[0]
    k = len(bank) if slots_Tk is None else slots_Tk.shape[1]
    ones = ds_MR.new_ones(len(rows.chunk_ptr) - 1, k)
    dx, dA = x_MK.new_empty(0), x_MK.new_empty(0)
    if needs[0]:
        dx = expand(ds_MR, ones, bank, slots_Tk, 1.0, rows, x_MK)
    if needs[1]:
        dA = weight_gradient(ds_MR, ones, x_MK, slots_Tk, 1.0, rows, A_GErK)
    return dx, dA


def expand_fwd(
    s_MR: Tensor,
    y_MN: Tensor | None,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`taskmoe.kernels.low_rank_cpu.expand_fwd`."""
    rows, like = Rows.of_plan(tables), s_MR.new_empty(0, dtype=dtype)
    return expand(s_MR, gates_Tk, B_GErN[0], slots_Tk, scale, rows, like, y_MN)


def expand_bwd(
    dy_MN: Tensor,
    s_MR: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    tables: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`taskmoe.kernels.low_rank_cpu.expand_bwd`."""
    rows = Rows.of_plan(tables)
    ds, dB, dgates = (s_MR.new_empty(0) for _ in range(3))
    if needs[0] or needs[2]:
        dh_MR = shrink(dy_MN, B_GErN[0], slots_Tk, rows, len(dy_MN))
        if needs[0]:
            r = B_GErN.shape[2]
            dh_MR = dh_MR.to(s_MR.dtype)
            over_rows = (gates_Tk.to(dh_MR.dtype) * scale).index_select(0, tables[0])
            ds = (dh_MR.unflatten(1, (-1, r)) * over_rows[:, :, None]).flatten(1)
        if needs[2]:
            dgates = gate_gradient(dh_MR, s_MR, gates_Tk, scale, rows)
    if needs[1]:
        dB = weight_gradient(s_MR, gates_Tk, dy_MN, slots_Tk, scale, rows, B_GErN)
    return ds, dB, dgates


def gated_fwd(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_ME: Tensor,
    scale: float,
    tables: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """See :func:`taskmoe.kernels.token_cpu.gated_fwd`."""
    rows = Rows.of_plan(tables, row_gates=True)
    s_MR = shrink(x_MK, A_GErK[0], None, rows, len(x_MK))
    return expand(s_MR, gates_ME, B_GErN[0], None, scale, rows, x_MK, y_MN), s_MR


def gated_bwd(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MR: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_ME: Tensor,
    scale: float,
    tables: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`taskmoe.kernels.token_cpu.gated_bwd`."""
    rows = Rows.of_plan(tables, row_gates=True)
    return _backward(dy_MN, x_MK, s_MR, A_GErK, B_GErN, gates_ME, None, scale, rows, needs)


def _backward(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MR: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    rows: Rows,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_A, need_B, need_gates = needs
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)  # one each: outputs of an op must not alias
    if need_x or need_A or need_gates:
        dh_MR = shrink(dy_MN, B_GErN[0], slots_Tk, rows, len(dy_MN))
        if need_x:
            dx = expand(dh_MR, gates, A_GErK[0], slots_Tk, scale, rows, x_MK)
        if need_A:
            dA = weight_gradient(dh_MR, gates, x_MK, slots_Tk, scale, rows, A_GErK)
        if need_gates:
            dgates = gate_gradient(dh_MR, s_MR, gates, scale, rows)
    if need_B:
        dB = weight_gradient(s_MR, gates, dy_MN, slots_Tk, scale, rows, B_GErN)
    return dx, dA, dB, dgates


def grouped_fwd(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Mk: Tensor,
    slots_Mk: Tensor,
    scale: float,
    groups: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """See :func:`taskmoe.kernels.token_cpu.grouped_fwd`."""
    rows, experts = _grouped(groups, gates_Mk.shape[1])
    s_Pr = shrink(x_MK, A_GErK[0], experts, rows, gates_Mk.numel())
    out = _expand_slots(s_Pr, gates_Mk, B_GErN[0], experts, scale, rows, x_MK, y_MN)
    return out, s_Pr.view(len(x_MK), gates_Mk.shape[1] * s_Pr.shape[1])


def grouped_bwd(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MR: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Mk: Tensor,
    slots_Mk: Tensor,
    scale: float,
    groups: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`taskmoe.kernels.token_cpu.grouped_bwd`."""
    need_x, need_A, need_B, need_gates = needs
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)
    rows, experts = _grouped(groups, gates_Mk.shape[1])
    s_Pr, gates_P1 = s_MR.view(gates_Mk.numel(), A_GErK.shape[2]), gates_Mk.reshape(-1, 1)
    if need_x or need_A or need_gates:
        dh_Pr = shrink(dy_MN, B_GErN[0], experts, rows, len(s_Pr))
        if need_x:
            dx = _expand_slots(dh_Pr, gates_Mk, A_GErK[0], experts, scale, rows, x_MK, None)
        if need_A:
            dA = weight_gradient(dh_Pr, gates_P1, x_MK, experts, scale, rows, A_GErK)
        if need_gates:
            dgates = gate_gradient(dh_Pr, s_Pr, gates_P1, scale, rows).view(gates_Mk.shape)
    if need_B:
        dB = weight_gradient(s_Pr, gates_P1, dy_MN, experts, scale, rows, B_GErN)
    return dx, dA, dB, dgates


def _grouped(groups: list[Tensor], k: int) -> tuple[Rows, Tensor]:
    """The rows of :func:`taskmoe.kernels.grouping.group_rows`, and the expert of each group [groups, 1]."""
    pairs, experts, _, tiles, chunks, chunk_ptr, size = groups
    return Rows(tiles, chunks, chunk_ptr, int(size), pairs, k, row_gates=True, by_expert=True), experts


def _expand_slots(
    rank_Pr: Tensor,
    gates_Mk: Tensor,
    bank_ErD: Tensor,
    experts: Tensor,
    scale: float,
    rows: Rows,
    like: Tensor,
    y_MD: Tensor | None,
) -> Tensor:
    """One launch a slot: each meets every token once, so that adding to ``out`` needs no atomics. Several are
    added up in fp32: rounding once a slot would tell."""
    gates_P1 = gates_Mk.reshape(-1, 1)
    k = gates_Mk.shape[1]
    out = like.new_empty(len(gates_Mk), bank_ErD.shape[2], dtype=rank_Pr.dtype if k > 1 else like.dtype)
    for j, tiles in enumerate(rows.tiles.chunk(k)):
        here = Rows(tiles, rows.chunks, rows.chunk_ptr, rows.size, rows.pairs, rows.per, True, True)
        expand(rank_Pr, gates_P1, bank_ErD, experts, scale, here, like, y_MD if j == 0 else out, out)
    return out.to(like.dtype)
