"""Token rows to one batch: sorted by task, ids checked on the host, padded on the right or packed.

Legend: B sequences, L positions, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskmoe.moe.tasks import TaskError
from taskmoe.train.data.packing import pack
from taskmoe.train.data.pairs import texts_of

Batch = dict[str, Any]

IGNORE = -100


class Collator:
    """Builds batches of one kind.

    Args:
        tokenizer: gives the padding id (its end-of-sequence id, or 0, when it has none).
        task_type: CAUSAL_LM | SEQ_2_SEQ_LM | SEQ_CLS | FEATURE_EXTRACTION.
        n_tasks: size of the task table.
        label_counts: SEQ_CLS: classes of each task.
        packing: causal LM: several rows a sequence.
        max_length: of a packed sequence.
        flat: all packs as one sequence without padding (flash attention).
    """

    def __init__(
        self,
        tokenizer: Any,
        task_type: str,
        n_tasks: int,
        label_counts: Sequence[int] | None = None,
        packing: bool = False,
        max_length: int | None = None,
        flat: bool = False,
    ) -> None:
        if packing and (task_type != "CAUSAL_LM" or max_length is None):
            raise ValueError("packing needs task_type CAUSAL_LM and a max_length")
        self.task_type, self.n_tasks, self.label_counts = task_type, n_tasks, label_counts
        self.packing, self.max_length, self.flat = packing, max_length, flat
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(i for i in ids if i is not None)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """A training batch.

        Args:
            rows: token rows (see ``cache.py``), each with ``task``.

        Returns:
            input_ids, attention_mask: int64 [B, L]; labels: int64 [B, L], seq2seq [B, L_target], SEQ_CLS [B],
            with -100 where there is no loss; task_ids: int64 [B] on the CPU; order: ``order[i]`` is the place
            in ``rows`` of the batch's i-th row; instance_embeddings, where rows have them. Packed: task_ids
            [B, L], position_ids [B, L], segment_ids [B, L] (the i of ``order``, -1 on padding) and no
            attention_mask. FEATURE_EXTRACTION: a row a text (:func:`taskmoe.train.data.pairs.texts_of`), and
            ``order`` of the queries.

        Raises:
            TaskError: a task id outside the table, or a label id outside the task's classes.
        """
        order = self._order(rows)
        rows = [rows[i] for i in order]
        if self.packing:
            return {**self._packed(rows), "order": order}
        if self.task_type == "FEATURE_EXTRACTION":
            texts, columns = texts_of(rows)
            return {
                "input_ids": pad(texts, self.pad_id),
                "attention_mask": pad([[1] * len(ids) for ids in texts], 0),
                **columns,
                "order": order,
            }
        inputs = [row["input_ids"] for row in rows]
        if self.task_type == "SEQ_CLS":
            labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        else:
            labels = pad([row["labels"] for row in rows], IGNORE)
        return {
            "input_ids": pad(inputs, self.pad_id),
            "attention_mask": pad([[1] * len(ids) for ids in inputs], 0),
            "labels": labels,
            "task_ids": torch.tensor([row["task"] for row in rows], dtype=torch.int64),
            **_instances(rows),
            "order": order,
        }

    def prompts(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """A batch to generate from: prompts alone, no labels; a causal LM's are padded on the left.

        Raises:
            TaskError: as in a call.
        """
        order = self._order(rows)
        rows = [rows[i] for i in order]
        causal = self.task_type == "CAUSAL_LM"
        inputs = [row["input_ids"][: row["prompt_length"]] if causal else row["input_ids"] for row in rows]
        return {
            "input_ids": pad(inputs, self.pad_id, left=causal),
            "attention_mask": pad([[1] * len(ids) for ids in inputs], 0, left=causal),
            "task_ids": torch.tensor([row["task"] for row in rows], dtype=torch.int64),
            **_instances(rows),
            "order": order,
        }

    def counts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens_T, samples_T), int64 [T]: loss tokens and rows of each task.

        A causal LM's first position predicts nothing and is not counted; a class label counts as one token.
        """
        labels, tasks = batch["labels"], batch["task_ids"]
        if self.packing:
            tokens_T = torch.bincount(tasks[:, 1:][labels[:, 1:] != IGNORE], minlength=self.n_tasks)
            starts = (batch["position_ids"] == 0) & (batch["segment_ids"] >= 0)
            return tokens_T, torch.bincount(tasks[starts], minlength=self.n_tasks)
        learned = labels != IGNORE
        if self.task_type == "CAUSAL_LM":
            learned = learned[:, 1:]
        per_row = learned.flatten(1).sum(dim=1) if learned.dim() > 1 else learned.to(torch.int64)
        tokens_T = torch.zeros(self.n_tasks, dtype=torch.int64).scatter_add_(0, tasks, per_row)
        return tokens_T, torch.bincount(tasks, minlength=self.n_tasks)

    def _order(self, rows: Sequence[dict[str, Any]]) -> list[int]:
        for row in rows:
            task = row["task"]
            if not isinstance(task, int) or not 0 <= task < self.n_tasks:
                raise TaskError(
                    f"task id {task!r} is not in the table of {self.n_tasks} tasks (0 to {self.n_tasks - 1})"
                )
            if self.task_type == "SEQ_CLS" and self.label_counts is not None:
                count = self.label_counts[task]
                if not 0 <= row["label"] < count:
                    raise TaskError(
                        f"label id {row['label']} of task {task} is not one of its {count} classes"
                    )
        return sorted(range(len(rows)), key=lambda i: rows[i]["task"])

    def _packed(self, rows: Sequence[dict[str, Any]]) -> Batch:
        assert self.max_length is not None
        packs = pack([len(row["input_ids"]) for row in rows], self.max_length)
        if self.flat:
            packs = [[i for one in packs for i in one]]
        names = ("input_ids", "labels", "task_ids", "position_ids", "segment_ids")
        columns: dict[str, list[list[int]]] = {name: [] for name in names}
        width = max(sum(len(rows[i]["input_ids"]) for i in one) for one in packs)
        for one in packs:
            out: dict[str, list[int]] = {name: [] for name in names}
            for i in one:
                ids = rows[i]["input_ids"]
                out["input_ids"] += ids
                # The row before must not be asked to predict this row's first token.
                out["labels"] += [IGNORE, *rows[i]["labels"][1:]]
                out["task_ids"] += [rows[i]["task"]] * len(ids)
                out["position_ids"] += range(len(ids))
                out["segment_ids"] += [i] * len(ids)
            rest = width - len(out["input_ids"])
            # Padding is a row of its own, which no other row sees.
            out["input_ids"] += [self.pad_id] * rest
            out["labels"] += [IGNORE] * rest
            out["task_ids"] += [out["task_ids"][-1]] * rest
            out["position_ids"] += range(rest)
            out["segment_ids"] += [-1] * rest
            for name in names:
                columns[name].append(out[name])
        return {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}


def _instances(rows: Sequence[dict[str, Any]]) -> Batch:
    """``instance_embeddings``, float32 [B, D], where rows have them (see ``train/instances.py``)."""
    if "instance" not in rows[0]:
        return {}
    return {"instance_embeddings": torch.tensor([row["instance"] for row in rows], dtype=torch.float32)}


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """int64 [len(rows), longest row]."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor(
        [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)], dtype=torch.int64
    )
