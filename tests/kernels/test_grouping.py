from __future__ import annotations

import pytest
import torch

from taskmoe.kernels.grouping import group_rows
from taskmoe.kernels.plan import chunk_rows, tile_rows

E = 3
# Row 3 names one expert twice; expert 2 gets no row in slot 1.
SLOTS = torch.tensor([[2, 0], [0, 1], [2, 1], [1, 1], [0, 0]])
TASKS = torch.tensor([1, 0, 1, 1, 0])


def random_slots(M: int, k: int) -> torch.Tensor:
    return torch.randint(E - 1, (M, k), generator=torch.Generator().manual_seed(M + k))


def test_pairs_of_a_slot_are_sorted_by_expert_and_token() -> None:
    pairs, experts, runs = group_rows(SLOTS, None, 1, E, tiles=False)
    assert (pairs.dtype, experts.dtype, runs.dtype) == (torch.int32, torch.int64, torch.int32)
    # Slot 0: expert 0 has tokens 1 and 4, expert 1 token 3, expert 2 tokens 0 and 2; pair = 2 * token + slot.
    assert pairs.tolist() == [2, 8, 6, 0, 4, 1, 9, 3, 5, 7]
    assert experts.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert runs.tolist() == [[0, 0, 2], [1, 2, 3], [2, 3, 5], [3, 5, 7], [4, 7, 10], [5, 10, 10]]


def test_with_a_task_axis_a_group_is_of_one_task() -> None:
    pairs, experts, runs = group_rows(SLOTS, TASKS, 2, E, tiles=False)
    assert len(experts) == len(runs) == 2 * 2 * E
    for group, first, end in runs.tolist():
        task, slot, expert = group // (2 * E), group // E % 2, int(experts[group])
        for pair in pairs[first:end].tolist():
            assert TASKS[pair // 2] == task and pair % 2 == slot and SLOTS[pair // 2, slot] == expert
    assert sorted(pairs.tolist()) == list(range(10))


@pytest.mark.parametrize("M", [0, 1, 17, 700])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("G", [1, 4])
def test_tiles_and_chunks_hold_every_pair_once(M: int, k: int, G: int) -> None:
    slots = random_slots(M, k)
    tasks = torch.arange(M) * G // max(M, 1) if G > 1 else None
    pairs, _, runs, tiles, chunks, chunk_ptr, size = group_rows(slots, tasks, G, E, tiles=True)
    assert int(size) == tile_rows(M, G * E) and size.device.type == "cpu"
    of_group = {group: (first, end) for group, first, end in runs.tolist()}
    for table, most in ((tiles, int(size)), (chunks, chunk_rows(M))):
        seen = torch.zeros(M * k, dtype=torch.int64)
        for group, first, end in table.tolist():
            if first < end:
                assert end - first <= most
                assert of_group[group][0] <= first and end <= of_group[group][1], "a piece straddles groups"
                seen[first:end] += 1
        assert bool((seen == 1).all())
    # A launch of one slot meets each token once: its tiles hold pairs of that slot alone.
    if M:
        for j, part in enumerate(tiles.chunk(k)):
            for _, first, end in part.tolist():
                assert bool((pairs[first:end] % k == j).all())
    filled = [group for group, first, end in chunks.tolist() if first < end]
    assert filled == sorted(filled)
    assert len(chunk_ptr) == G * k * E + 1
    for group in range(G * k * E):
        mine = chunks[chunk_ptr[group] : chunk_ptr[group + 1]]
        rows = sum(end - first for _, first, end in mine.tolist())
        assert bool((mine[:, 0] == group).all())
        assert rows == of_group[group][1] - of_group[group][0]


def test_there_is_room_for_the_worst_case() -> None:
    # The number of pieces may depend on the shape alone: all rows on one expert, and spread evenly.
    M = 400
    one = torch.zeros(M, 1, dtype=torch.int64)
    even = (torch.arange(M) % E)[:, None]
    skew = torch.cat([torch.tensor([1, 2]), torch.zeros(M - 2, dtype=torch.int64)])[:, None]
    shapes = {
        tuple(t.shape for t in group_rows(slots, None, 1, E, tiles=True)) for slots in (one, even, skew)
    }
    assert len(shapes) == 1
