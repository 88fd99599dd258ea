"""Rows sorted by expert, for token-level routing: built where the routing is, without a sync.

How many rows an expert gets is known on the device only, so the tables have room for the worst case and their
surplus is empty.

Legend: M tokens, k experts of a token, E experts, G entries of the task axis (1 or T), J = G*k*E groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskmoe.kernels.plan import chunk_rows, cut, tile_rows


def group_rows(slots_Mk: Tensor, row_tasks: Tensor | None, G: int, E: int, *, tiles: bool) -> list[Tensor]:
    """The (token, expert) pairs of each slot, sorted by task (where G > 1) and expert; equal ones by token.

    Args:
        slots_Mk: int64 expert ids, on any device. Ids outside ``0..E - 1`` are not checked.
        row_tasks: int64 [M], the task of each token; used where G > 1.
        tiles: whether the Triton kernels will walk them.

    Returns:
        ``pairs`` int32 [k * M]: slot after slot, pair ``token * k + slot``;
        ``experts`` int64 [J, 1], the expert of each group; groups go by (task, slot, expert);
        ``runs`` int32 [J, 3]: (group, first place in pairs, place after the last), slot after slot, as pairs
        are; with ``tiles`` also ``tiles [k * n, 3]`` slot after slot, ``chunks [c, 3]`` and ``chunk_ptr [J +
        1]`` in the order of the groups, and the rows of a tile, a number on the host.
    """
    M, k = slots_Mk.shape
    device = slots_Mk.device
    keys_kM = slots_Mk.t()
    if G > 1:
        assert row_tasks is not None
        keys_kM = keys_kM + row_tasks * E
    sorted_kM, tokens_kM = torch.sort(keys_kM.contiguous(), dim=1, stable=True)
    slot_k1 = torch.arange(k, device=device)[:, None]
    pairs = (tokens_kM * k + slot_k1).flatten().int()
    bounds = torch.searchsorted(sorted_kM, torch.arange(G * E + 1, device=device).repeat(k, 1))
    starts = (bounds[:, :-1] + slot_k1 * M).view(k, G, E)
    sizes = bounds.diff(dim=1).view(k, G, E)
    groups = torch.arange(G * k * E, device=device).view(G, k, E).transpose(0, 1)
    experts = torch.arange(E, device=device).repeat(G * k)[:, None]
    runs = torch.stack([groups, starts, starts + sizes], dim=-1).view(-1, 3).int()
    if not tiles:
        return [pairs, experts, runs]
    size, chunk = tile_rows(M, G * E), chunk_rows(M)

    def room(rows: int, parts: int, piece: int) -> int:
        """Pieces that any ``parts`` runs over ``rows`` rows may need: one that is not full each."""
        return rows // piece + min(parts, rows)

    per_slot = [
        cut(groups[j].flatten(), starts[j].flatten(), sizes[j].flatten(), size, room(M, G * E, size))[0]
        for j in range(k)
    ]
    by_group = [t.transpose(0, 1).flatten() for t in (groups, starts, sizes)]
    chunks, chunk_ptr = cut(by_group[0], by_group[1], by_group[2], chunk, room(M * k, G * k * E, chunk))
    return [pairs, experts, runs, torch.cat(per_slot), chunks, chunk_ptr, torch.tensor(size)]
