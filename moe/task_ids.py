"""The ``task_ids`` that callers pass: read in every form, checked against the table and against the batch.

Legend: B sequences, L positions.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from taskmoe.moe.context import Context
from taskmoe.moe.tasks import TaskError, TaskTable


def read_task_ids(task_ids: Any, tasks: TaskTable) -> list[Any]:
    """Ids on the host: B ints, or for packed rows B lists of L ints.

    Args:
        task_ids: an integer tensor or array [B] or [B, L], or lists of ids or names.
        tasks: the table that they name.

    Raises:
        TaskError: missing or empty ids, something that is no id, a task that is not in the table.
    """
    if task_ids is None:
        raise TaskError("task_ids are missing: pass one task id (or name) per sequence")
    integers = isinstance(task_ids, Tensor) and str(task_ids.dtype).startswith(("torch.int", "torch.uint"))
    ids = task_ids.tolist() if hasattr(task_ids, "tolist") else task_ids
    if not isinstance(ids, (list, tuple)):
        raise TaskError(
            f"task_ids are {ids!r}: pass a list or tensor with one task id (or name) per sequence"
        )
    packed = bool(ids) and isinstance(ids[0], (list, tuple))
    rows = [list(row) for row in ids] if packed else [list(ids)]
    if len({len(row) for row in rows}) > 1:
        raise TaskError("packed task_ids have rows of unequal length: pass one task per position, [B, L]")
    if not rows[0]:
        raise TaskError("task_ids are empty: pass one task id (or name) per sequence")
    if not integers:  # a tensor of 16 x 1024 positions needs no look at each
        rows = [[_read(task, tasks) for task in row] for row in rows]
    for row in rows:
        low, high = min(row), max(row)
        if low < 0 or high >= len(tasks):
            bad = low if low < 0 else high
            raise TaskError(f"task id {bad} is not in the table of {len(tasks)} tasks (0..{len(tasks) - 1})")
    return rows if packed else rows[0]


def _read(task: Any, tasks: TaskTable) -> int:
    if isinstance(task, str):
        return tasks.id(task)
    if isinstance(task, bool) or not hasattr(task, "__index__"):
        raise TaskError(f"task_ids hold {task!r}: give whole numbers or task names")
    return operator.index(task)


def check_batch(context: Context, inputs: Mapping[str, Any], main_input: str) -> None:
    """Check that there is one task a sequence, or a position, of the inputs.

    Layers split their rows evenly over the sequences, so a wrong number of ids could go unnoticed there.

    Raises:
        TaskError: the sizes differ.
    """
    for name in dict.fromkeys((main_input, "inputs", "input_ids", "inputs_embeds", "decoder_input_ids")):
        value = inputs.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.shape[0] != context.num_sequences:
            raise TaskError(
                f"task_ids name {context.num_sequences} sequences, {name} holds {value.shape[0]}: "
                "pass one task per sequence"
            )
        if context.packed and name == main_input and value.shape[1] != context.length:
            raise TaskError(
                f"packed task_ids have {context.length} positions a row, {name} has {value.shape[1]}: "
                "pass one task per position"
            )
