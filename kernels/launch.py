"""Launches of the Triton kernels: one function a kernel, from tensors to tensors.

:class:`Rows` says how the rows of a batch fall into groups; everything else is read off the tensors.

Legend: M rows, D the wide dimension (d_in or d_out), E experts, r rank of one expert, k slots of a group, R
= k*r, G entries of the result's task axis.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskmoe.kernels import configs, low_rank_triton
from taskmoe.kernels.plan import tile_rows
from taskmoe.kernels.ways import accumulator

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
DTYPES = {**ACCUMULATORS, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Rows:
    """The rows of a batch in groups.

    tiles: int32 [n, 3]; chunks: int32 [c, 3] sorted by group; chunk_ptr: int32 [groups + 1]; size: rows of a
        tile.
    pairs: int32, the (token, expert) pair behind each row, with ``per`` pairs a token; None: rows are the
        tokens.
    row_gates: gates are one row a rank row rather than one a group.
    by_expert: groups are (..., expert) in this order, each of one slot.
    """

    tiles: Tensor
    chunks: Tensor
    chunk_ptr: Tensor
    size: int
    pairs: Tensor | None = None
    per: int = 1
    row_gates: bool = False
    by_expert: bool = False

    @classmethod
    def of_plan(cls, tables: list[Tensor], row_gates: bool = False) -> Rows:
        """Of ``Plan.op_tables(device, tiles=True)``."""
        tiles, chunks, chunk_ptr = tables[3:6]
        rows = int(tables[-2][-1])
        return cls(tiles, chunks, chunk_ptr, tile_rows(rows, len(tables[-1])), row_gates=row_gates)


def shrink(wide_MD: Tensor, bank_ErD: Tensor, slots: Tensor | None, rows: Rows, rank_rows: int) -> Tensor:
    """``wide @ bank^T`` for the experts of each group: fp32 or fp64 ``[rank_rows, R]``.

    slots: int64 [groups, k]; None: slot j is expert j.
    """
    E, r, D = bank_ErD.shape
    R = r * (E if slots is None else slots.shape[1])
    wide_MD, bank_ErD = _rowwise(wide_MD), bank_ErD.contiguous()
    acc = accumulator(wide_MD.dtype)
    out = wide_MD.new_empty(rank_rows, R, dtype=acc)
    at = _launch("shrink", wide_MD, R, D)
    BR = configs.rank_bucket(R)
    if len(rows.tiles) and R:
        with _on(wide_MD):
            low_rank_triton.shrink[(len(rows.tiles), triton.cdiv(R, BR))](
                wide_MD, bank_ErD, slots, rows.tiles, rows.pairs, out, wide_MD.stride(0), D,
                r=r, R=R, SLOTS=slots is not None, PAIRS=rows.pairs is not None, PER=rows.per, BM=rows.size,
                BR=BR, BD=at.width, ACC=ACCUMULATORS[acc], PRECISION=_precision(wide_MD),
                num_warps=at.num_warps, num_stages=at.num_stages,
            )  # fmt: skip
    return out


def expand(
    rank_MR: Tensor,
    gates: Tensor,
    bank_ErD: Tensor,
    slots: Tensor | None,
    scale: float,
    rows: Rows,
    like: Tensor,
    y_MD: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``y + scale * (gates * rank) @ bank`` for the experts of each group, ``[M, D]``.

    gates: [groups, k], or [rows of rank, k] with ``rows.row_gates``. like: of the dtype of the products. out:
    where to write, in any dtype; may be ``y`` itself; None: a new tensor like ``like``.
    """
    E, r, D = bank_ErD.shape
    R = r * (E if slots is None else slots.shape[1])
    rank_MR, bank_ErD = _rowwise(rank_MR), bank_ErD.contiguous()
    if out is None:
        out = like.new_empty(rank_MR.shape[0] // rows.per, D)
    add = y_MD is not None
    y_MD = _rowwise(y_MD) if y_MD is not None else out
    at = _launch("expand", like, R, D)
    if len(rows.tiles):
        with _on(like):
            low_rank_triton.expand[(len(rows.tiles), triton.cdiv(D, at.width))](
                rank_MR, gates.contiguous(), bank_ErD, slots, rows.tiles, rows.pairs, y_MD, out,
                rank_MR.stride(0), y_MD.stride(0), D, SCALE=scale, r=r, R=R, SLOTS=slots is not None,
                PAIRS=rows.pairs is not None, PER=rows.per, ROW_GATES=rows.row_gates, ADD=add, BM=rows.size,
                BR=configs.expand_columns(R, 8 * like.element_size()), BD=at.width, DOT=DTYPES[like.dtype],
                ACC=ACCUMULATORS[accumulator(like.dtype)], PRECISION=_precision(like),
                num_warps=at.num_warps, num_stages=at.num_stages,
            )  # fmt: skip
    return out


def weight_gradient(
    rank_MR: Tensor,
    gates: Tensor,
    wide_MD: Tensor,
    slots: Tensor | None,
    scale: float,
    rows: Rows,
    bank_GErD: Tensor,
) -> Tensor:
    """``scale * (gates * rank)^T wide`` added up for each expert (and task, where G > 1), like
    ``bank_GErD``."""
    E, r, D = bank_GErD.shape[1:]
    k = 1 if rows.by_expert else (E if slots is None else slots.shape[1])
    R = k * r
    rank_MR, wide_MD = _rowwise(rank_MR), _rowwise(wide_MD)
    acc = accumulator(wide_MD.dtype)
    part = wide_MD.new_empty(len(rows.chunks), R, D, dtype=acc)
    at = _launch("wgrad", wide_MD, R, D)
    BR = configs.rank_bucket(R)
    if len(rows.chunks):
        with _on(wide_MD):
            low_rank_triton.wgrad[(len(rows.chunks), triton.cdiv(D, at.width), triton.cdiv(R, BR))](
                rank_MR, gates.contiguous(), wide_MD, rows.chunks, rows.pairs, part, rank_MR.stride(0),
                wide_MD.stride(0), D, SCALE=scale, r=r, R=R, PAIRS=rows.pairs is not None, PER=rows.per,
                ROW_GATES=rows.row_gates, BM=at.rows, BR=BR, BD=at.width, ACC=ACCUMULATORS[acc],
                PRECISION=_precision(wide_MD), num_warps=at.num_warps, num_stages=at.num_stages,
            )  # fmt: skip
    return reduce(part, slots, rows, bank_GErD)


def reduce(part_cRD: Tensor, slots: Tensor | None, rows: Rows, like_GErD: Tensor) -> Tensor:
    """The partial sums of the chunks added up for each expert, in a fixed order; zeros where there are
    none."""
    G, E, r, D = like_GErD.shape
    out = torch.empty(G, E, r, D, dtype=like_GErD.dtype, device=like_GErD.device)
    BR, BD = configs.reduce_tile(r, D)
    with _on(part_cRD):
        low_rank_triton.reduce[(G * E, triton.cdiv(D, BD))](
            part_cRD, slots, rows.chunk_ptr, out, E, D, (len(rows.chunk_ptr) - 1) // G,
            k=part_cRD.shape[1] // r, r=r, SLOTS=slots is not None and not rows.by_expert,
            BY_EXPERT=rows.by_expert, BR=BR, BD=BD, ACC=ACCUMULATORS[part_cRD.dtype],
            **configs.REDUCE_OPTIONS,
        )  # fmt: skip
    return out


def gate_gradient(drank_MR: Tensor, rank_MR: Tensor, gates: Tensor, scale: float, rows: Rows) -> Tensor:
    """``scale * <drank, rank>`` over the columns of each slot (and, with gates a group, over its rows), like
    gates."""
    k = gates.shape[1]
    if rows.row_gates:
        return ((drank_MR * rank_MR).unflatten(1, (k, -1)).sum(-1) * scale).to(gates.dtype)
    R = rank_MR.shape[1]
    rank_MR = _rowwise(rank_MR)
    part = rank_MR.new_empty(len(rows.chunks), R, 1)
    BR = min(128, triton.next_power_of_2(R))
    if len(rows.chunks):
        with _on(rank_MR):
            low_rank_triton.gate_grad[(len(rows.chunks), triton.cdiv(R, BR))](
                rank_MR, drank_MR.contiguous(), rows.chunks, part, rank_MR.stride(0), R=R, BM=32, BR=BR,
                ACC=ACCUMULATORS[rank_MR.dtype], num_warps=4,
            )  # fmt: skip
    # Slot j of a group as expert j of a bank of width one.
    by_slot = part.new_empty(len(gates), k, R // k, 1)
    return (reduce(part, None, rows, by_slot).sum((-1, -2)) * scale).to(gates.dtype)


def _rowwise(t: Tensor) -> Tensor:
    """Rows may lie anywhere; within a row the kernels step by one."""
    return t if t.stride(1) == 1 else t.contiguous()


def _precision(t: Tensor) -> str:
    """Triton's own default for fp32 is TF32; here torch's setting decides."""
    return "tf32" if t.dtype == torch.float32 and _tf32() else "ieee"


def _tf32() -> bool:
    # torch refuses to read the old setting once the new one has been written.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return torch.backends.cuda.matmul.allow_tf32
    if precision == "none":  # as for all backends
        precision = getattr(torch.backends, "fp32_precision", "none")
    return precision == "tf32"


def _launch(kernel: str, wide: Tensor, R: int, D: int) -> configs.Launch:
    arch, gpu = _gpu(wide.device.index or 0) if wide.is_cuda else ("", "")
    return configs.launch(arch, gpu, kernel, R, D, 8 * wide.element_size())


_GPUS: dict[int, tuple[str, str]] = {}


def _gpu(index: int) -> tuple[str, str]:
    if index not in _GPUS:
        major, minor = torch.cuda.get_device_capability(index)
        _GPUS[index] = f"sm_{major}{minor}", torch.cuda.get_device_name(index)
    return _GPUS[index]


def _on(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
