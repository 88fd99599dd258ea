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


@torch.no_grad()
def _nearest(pair: Pair, rank: int) -> tuple[Pair, float]:
    A_RK, B_RN = (factor.double() for factor in pair)
    right_KR, a_RR = torch.linalg.qr(A_RK.T)
    left_NR, b_RR = torch.linalg.qr(B_RN.T)
    U_RR, s_R, V_RR = torch.linalg.svd(b_RR @ a_RR.T)
    root_Q1 = s_R[:rank, None].sqrt()
    A_QK = root_Q1 * (V_RR[:rank] @ right_KR.T)
    B_QN = root_Q1 * (left_NR @ U_RR[:, :rank]).T
    whole = float(s_R.norm())
    lost = float(s_R[rank:].norm()) / whole if whole else 0.0
    return Pair(_plain(A_QK, pair.A_RK), _plain(B_QN, pair.B_RN)), lost


def _plain(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.dtype).contiguous()
