"""LoRAs of lower rank: the nearest ones, and how far they are.

Legend: R rank of the product, Q rank kept, K d_in, N d_out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taskmoe.moe.collapse import Pair


def truncate(pairs: Mapping[str, Pair], max_rank: int) -> tuple[dict[str, Pair], dict[str, float]]:
    """The pairs, those of a rank above ``max_rank`` in place of their nearest product of that rank.

    Nearest in the Frobenius norm (Eckart and Young 1936), computed in float64 from the factors alone. Pairs
    that fit stay as they are.

    Returns:
        The pairs, and {linear: |B^T A - its truncation| / |B^T A|}, 0.0 where nothing was cut.

    Raises:
        ValueError: max_rank below 1.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank: {max_rank} must be at least 1")
    kept, errors = {}, {}
    for name, pair in pairs.items():
        kept[name], errors[name] = pair, 0.0
        if len(pair.A_RK) > max_rank:
            kept[name], errors[name] = _nearest(pair, max_rank)
    return kept, errors


def shortest(whole: Pair | Tensor, max_rank: int | None = None) -> tuple[Pair, float]:
    """The pair of the lowest rank whose product is ``whole``, or the nearest to it of rank ``max_rank``.

    Args:
        whole: a pair, which stays as it is where it is no longer than it must be; or a delta [N, K].

    Returns:
        The pair, of rank 0 where ``whole`` is zero, and what :func:`truncate` says of its error.
    """
    U_NR, s_R, V_RK = _decomposed(whole)
    dtype = whole.dtype if isinstance(whole, Tensor) else whole.A_RK.dtype
    # Of a pair what is below is the rounding of this decomposition; of a delta that of its own entries.
    noise = 8 * torch.finfo(dtype).eps if isinstance(whole, Tensor) else 1e-10
    rank = int((s_R > noise * s_R[:1]).sum())
    if isinstance(whole, Pair) and rank == len(whole.A_RK) and (max_rank is None or rank <= max_rank):
        return whole, 0.0
    return _halved(U_NR, s_R[:rank], V_RK, rank if max_rank is None else min(rank, max_rank), dtype)


def _nearest(pair: Pair, rank: int) -> tuple[Pair, float]:
    return _halved(*_decomposed(pair), rank, pair.A_RK.dtype)


@torch.no_grad()
def _decomposed(whole: Pair | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, R], s [R], V [R, K] float64: the singular value decomposition of the product, or of the delta."""
    if isinstance(whole, Tensor):
        U_NR, s_R, V_RK = torch.linalg.svd(whole.double(), full_matrices=False)
        return U_NR, s_R, V_RK
    A_RK, B_RN = (factor.double() for factor in whole)
    right_KR, a_RR = torch.linalg.qr(A_RK.T)
    left_NR, b_RR = torch.linalg.qr(B_RN.T)
    U_RR, s_R, V_RR = torch.linalg.svd(b_RR @ a_RR.T, full_matrices=False)
    return left_NR @ U_RR, s_R, V_RR @ right_KR.T


@torch.no_grad()
def _halved(U_NR: Tensor, s_R: Tensor, V_RK: Tensor, rank: int, dtype: torch.dtype) -> tuple[Pair, float]:
    """The ``rank`` largest directions, each singular value shared by both factors, and what is lost."""
    root_Q1 = s_R[:rank, None].sqrt()
    A_QK, B_QN = root_Q1 * V_RK[:rank], root_Q1 * U_NR[:, :rank].T
    whole = float(s_R.norm())
    lost = float(s_R[rank:].norm()) / whole if whole else 0.0
    return Pair(A_QK.to(dtype).contiguous(), B_QN.to(dtype).contiguous()), lost
