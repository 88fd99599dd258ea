"""Runs that route tokens, as one LoRA a task all the same: with the mean gates of the task's tokens, and what
that costs."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from taskmoe.moe.layer import MoELinear
from taskmoe.moe.snapshot import FILE, Snapshot
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.objectives import model_inputs, token_losses
from taskmoe.train.predict import spread
from taskmoe.train.run_folder import TOKENIZER
from taskmoe.train.setup import build_data
from taskmoe.train.trained_run import ALONE, TrainedRun


class AverageError(ValueError):
    """There are no gates of tokens, or none to be averaged."""


def mean_gates(trained: TrainedRun) -> dict[str, Tensor]:
    """{linear: [T, 1, E]}: the mean gates of each task's tokens, as the run saw them last.

    Raises:
        AverageError: gates depend on the task alone, or the run has not recorded them.
        SnapshotError: the file of them cannot be read.
    """
    layers = trained.model.base_model.named_modules()
    wanted = [n for n, m in layers if isinstance(m, MoELinear) and m.token_routing is not None]
    if not wanted:
        raise AverageError("--average: no LoRA beside a linear is routed by token in this run; leave it out")
    found = Snapshot.load(trained.checkpoint / FILE)
    missing = [name for name in wanted if name not in found.gates]
    if found.level != "token" or missing:
        raise AverageError(
            f"--average: {trained.checkpoint / FILE} has no gates of the tokens at {(missing or wanted)[0]}; "
            "train on for some steps, so that they are seen"
        )
    return dict(found.gates)


class Losses:
    """Mean losses over the target tokens of a task's rows, those of the run's ``eval_split`` that its own
    evaluation reads.

    Raises:
        ConfigError, DataError: the run's data cannot be read.
    """

    def __init__(self, trained: TrainedRun) -> None:
        self.trained, config = trained, trained.config

        def say(line: str) -> None:
            print(f"taskmoe: {line}", file=sys.stderr)

        tasks, split = trained.model.tasks, config.eval_split
        data = build_data(config, ALONE, (split,), tasks, trained.home / TOKENIZER, say)
        self.splits: dict[int, TaskSplit] = {s.task: s for s in data.bundle.splits[split]}
        self.collate = Collator(
            data.tokenizer, config.task_type, data.collator.n_tasks, data.collator.label_counts
        )

    @torch.no_grad()
    def of(self, task: int, plain: nn.Module | None = None) -> float:
        """Of the run, or of a plain model in its place; NaN for a task without rows."""
        config, split = self.trained.config, self.splits[task]
        rows = spread(len(split.tokens), config.evaluation.max_rows)
        size = config.per_device_eval_batch_size
        total, count = 0.0, 0
        for first in range(0, len(rows), size):
            batch = self.collate([{**split.tokens[i], "task": task} for i in rows[first : first + size]])
            inputs = model_inputs(batch, config.task_type, self.trained.model.config, "cpu")
            if plain is not None:
                inputs = {n: v for n, v in inputs.items() if n not in ("task_ids", "instance_embeddings")}
            logits = (self.trained.model if plain is None else plain)(**inputs).logits
            losses_n = token_losses(logits, batch, config.task_type)[0]
            total, count = total + float(losses_n.double().sum()), count + len(losses_n)
        return total / count if count else float("nan")
