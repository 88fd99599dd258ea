"""A micro-batch's passes: what a task's slice holds."""

from __future__ import annotations

import torch

from taskmoe.train.micro_batch import task_slice
from taskmoe.train.objectives import IGNORE, count


def test_a_slice_has_the_rows_of_its_task():
    batch = {"input_ids": torch.arange(12).view(4, 3), "labels": torch.arange(12).view(4, 3) + 20,
             "task_ids": torch.tensor([1, 0, 1, 2])}  # fmt: skip
    part = task_slice(batch, 1)
    assert part["input_ids"].tolist() == [[0, 1, 2], [6, 7, 8]] and part["task_ids"].tolist() == [1, 1]


def test_a_task_that_is_not_there_gives_a_row_without_targets():
    batch = {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 3).long(),
             "task_ids": torch.tensor([0, 0])}  # fmt: skip
    part = task_slice(batch, 3)
    assert part["input_ids"].shape == (1, 3) and (part["labels"] == IGNORE).all()
    assert part["task_ids"].tolist() == [0]  # the row is what it was


def test_packed_rows_lose_the_targets_of_other_tasks():
    batch = {"input_ids": torch.ones(1, 6).long(), "labels": torch.arange(6).view(1, 6),
             "task_ids": torch.tensor([[0, 0, 0, 2, 2, 2]]),
             "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}  # fmt: skip
    part = task_slice(batch, 2)
    assert part["labels"].tolist() == [[IGNORE, IGNORE, IGNORE, 3, 4, 5]]
    assert count(part, "CAUSAL_LM", 3).tokens_T.tolist() == [0, 0, 2]
    assert batch["labels"].tolist() == [[0, 1, 2, 3, 4, 5]]
