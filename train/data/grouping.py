"""Rows of similar length together, so that less of a batch is padding."""

from __future__ import annotations

import random
from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], batch_size: int, seed: int = 0) -> list[list[int]]:
    """Cut the rows of a window into batches of similar length.

    The rows are sorted by length and cut; the batches come in a seeded order, because a window that runs from short
    to long rows would be a curriculum. The result depends on the arguments alone.

    Args:
        lengths: of the rows, in the order of the sampler.
        batch_size: rows of a batch; the last one may be smaller.
        seed: of the order of the batches (e.g. the window's number).

    >>> group_by_length([9, 1, 8, 2], 2)
    [[1, 3], [2, 0]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1")
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    random.Random(seed).shuffle(batches)
    return batches
