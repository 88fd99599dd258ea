"""Rows of a query and the text it must find, to one batch of texts.

Legend: B rows, N texts of the batch (a query, a right text and perhaps wrong ones a row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
QUERY, TEXT, WRONG = 0, 1, 2  # roles


def key_of(ids: Sequence[int]) -> int:
    """A whole number that equal texts share, on any rank (63 bits of a hash)."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def texts_of(rows: Sequence[dict[str, Any]]) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The token ids of all texts of rows that are sorted by task, and what belongs to each text.

    Args:
        rows: token rows with ``input_ids`` (the query), ``labels`` (the text to find), perhaps ``negatives``
            (texts that are wrong), and ``task``.

    Returns:
        N lists of ids, row after row, and int64 [N] each: ``labels`` (a query's row in the batch; -100 for
        other texts), ``pairs`` (the row), ``roles`` (0 query, 1 the text to find, 2 a wrong one), ``keys``
        (equal for equal texts), ``task_ids``.
    """
    ids: list[list[int]] = []
    columns: dict[str, list[int]] = {n: [] for n in ("labels", "pairs", "roles", "keys", "task_ids")}
    for place, row in enumerate(rows):
        texts = [row["input_ids"], row["labels"], *row.get("negatives", ())]
        ids += texts
        columns["labels"] += [place] + [IGNORE] * (len(texts) - 1)
        columns["pairs"] += [place] * len(texts)
        columns["roles"] += [QUERY, TEXT] + [WRONG] * (len(texts) - 2)
        columns["keys"] += [key_of(text) for text in texts]
        columns["task_ids"] += [row["task"]] * len(texts)
    return ids, {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
