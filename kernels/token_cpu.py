"""Token-level gates on the CPU, and wherever no kernel runs: every expert densely, or rows sorted by expert.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, k slots of a token, C = E*r, R = k*r, G 1
or T, P = M*k pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taskmoe.kernels.ways import Dense, accumulator


def gated_fwd(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_ME: Tensor,
    scale: float,
    tables: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The sum of ``y`` and the gated experts ``[M, N]``, and the ungated rank-space product ``s [M, C]``."""
    way = _dense(x_MK, A_GErK, tables)
    s_MC = way.shrink(x_MK, A_GErK[0])
    return way.expand(_gated(s_MC, gates_ME, scale), B_GErN[0], x_MK.dtype, y_MN), s_MC


def gated_bwd(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MC: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_ME: Tensor,
    scale: float,
    tables: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B and the gates; an empty tensor for each that is not in ``needs``."""
    need_x, need_A, need_B, need_gates = needs
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)  # one each: outputs of an op must not alias
    way = _dense(x_MK, A_GErK, tables)
    if need_x or need_A or need_gates:
        dh_MC = way.shrink(dy_MN, B_GErN[0])
        ds_MC = _gated(dh_MC, gates_ME, scale)
        if need_x:
            dx = way.expand(ds_MC, A_GErK[0], x_MK.dtype, None)
        if need_A:
            dA = way.weight_gradient(ds_MC, x_MK, A_GErK)
        if need_gates:
            by_expert = (dh_MC * s_MC).unflatten(1, (gates_ME.shape[1], -1)).sum(-1)
            dgates = (by_expert * scale).to(gates_ME.dtype)
    if need_B:
        dB = way.weight_gradient(_gated(s_MC, gates_ME, scale), dy_MN, B_GErN)
    return dx, dA, dB, dgates


def _dense(x_MK: Tensor, A_GErK: Tensor, tables: Sequence[Tensor]) -> Dense:
    return Dense(A_GErK.shape[2], A_GErK.shape[1], None, tables, accumulator(x_MK.dtype))


def _gated(h_MC: Tensor, gates_ME: Tensor, scale: float) -> Tensor:
    scaled_ME = gates_ME.to(h_MC.dtype) * scale
    return (h_MC.unflatten(1, (scaled_ME.shape[1], -1)) * scaled_ME[:, :, None]).flatten(1)


def grouped_fwd(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Mk: Tensor,
    slots_Mk: Tensor,
    scale: float,
    groups: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The sum of ``y`` and each token's experts ``[M, N]``, and the ungated rank-space product ``s [M, R]``.

    ``groups``: of :func:`taskmoe.kernels.grouping.group_rows`.
    """
    k, acc, dtype = gates_Mk.shape[1], accumulator(x_MK.dtype), x_MK.dtype
    r, N = B_GErN.shape[2:]
    A_ErK, B_ErN = A_GErK[0].to(dtype), B_GErN[0].to(dtype)
    scaled_P1 = gates_Mk.reshape(-1, 1).to(acc) * scale
    s_Pr = x_MK.new_empty(gates_Mk.numel(), r, dtype=acc)
    out_MN = x_MK.new_zeros(len(x_MK), N, dtype=acc) if y_MN is None else y_MN.to(acc, copy=True)
    for expert, _, pairs, tokens in _runs(groups, k):
        s = torch.mm(x_MK[tokens], A_ErK[expert].t()).to(acc)
        s_Pr[pairs] = s
        h = (s * scaled_P1[pairs]).to(dtype)
        out_MN.index_add_(0, tokens, torch.mm(h, B_ErN[expert]).to(acc))  # a token stands once in a run
    return out_MN.to(dtype), s_Pr.view(len(x_MK), k * r)


def grouped_bwd(
    dy_MN: Tensor,
    x_MK: Tensor,
    s_MR: Tensor,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Mk: Tensor,
    slots_Mk: Tensor,
    scale: float,
    groups: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B and the gates; an empty tensor for each that is not in ``needs``."""
    need_x, need_A, need_B, need_gates = needs
    dx, dA, dB, dgates = (x_MK.new_empty(0) for _ in needs)
    k, acc, dtype, G = gates_Mk.shape[1], s_MR.dtype, x_MK.dtype, A_GErK.shape[0]
    A_ErK, B_ErN = A_GErK[0].to(dtype), B_GErN[0].to(dtype)
    scaled_P1 = gates_Mk.reshape(-1, 1).to(acc) * scale
    s_Pr = s_MR.reshape(scaled_P1.shape[0], A_GErK.shape[2])
    if need_x:
        dx = x_MK.new_zeros(x_MK.shape, dtype=acc)
    if need_A:
        dA = x_MK.new_zeros(A_GErK.shape, dtype=acc)
    if need_B:
        dB = x_MK.new_zeros(B_GErN.shape, dtype=acc)
    if need_gates:
        dgates = x_MK.new_zeros(scaled_P1.shape[0], dtype=acc)
    for expert, task, pairs, tokens in _runs(groups, k):
        g, dy = (task if G > 1 else 0), dy_MN[tokens]
        if need_x or need_A or need_gates:
            dh = torch.mm(dy, B_ErN[expert].t()).to(acc)
            ds = dh * scaled_P1[pairs]
            if need_x:
                dx.index_add_(0, tokens, torch.mm(ds.to(dtype), A_ErK[expert]).to(acc))
            if need_A:
                dA[g, expert].addmm_(ds.t(), x_MK[tokens].to(acc))
            if need_gates:
                dgates[pairs] = (dh * s_Pr[pairs]).sum(1) * scale
        if need_B:
            dB[g, expert].addmm_((s_Pr[pairs] * scaled_P1[pairs]).t(), dy.to(acc))
    dgates = dgates.view(gates_Mk.shape) if need_gates else dgates
    like = (x_MK, A_GErK, B_GErN, gates_Mk)
    dx, dA, dB, dgates = (grad.to(t.dtype) for grad, t in zip((dx, dA, dB, dgates), like, strict=True))
    return dx, dA, dB, dgates


def _runs(groups: Sequence[Tensor], k: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(expert, task, pairs, tokens) of each run that is not empty, in the order of the pairs."""
    pairs, experts, runs = groups[:3]
    ids = experts.flatten().tolist()
    E = max(ids) + 1
    for group, first, end in runs.tolist():
        if first < end:
            here = pairs[first:end].long()
            yield ids[group], group // (k * E), here, here // k
