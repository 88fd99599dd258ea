"""Learn what belongs to new tasks, all of them in one model: none moves what another owns.

Legend: n targets, T tasks.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe import TaskMoEModel
from taskmoe.moe.own_rows import OwnRows
from taskmoe.train.adapt.data import Shots
from taskmoe.train.adapt.settings import AdaptSettings
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.engine import build_optimizer
from taskmoe.train.objectives import model_inputs, token_losses
from taskmoe.train.schedule import ROUTER_FACTOR, SCHEDULES, warmup_steps


@dataclass(frozen=True)
class Fitted:
    """Of one task. steps: those whose result was kept, out of ``max_steps``; before, after: the loss of its
    validation rows at the start and in the end, None without such rows."""

    steps: int
    before: float | None
    after: float | None


class Fitter:
    """Trains parts of one model on the shots of tasks.

    Args:
        splits: {task: its training rows}; shots: {task: which of them}.
    """

    def __init__(
        self,
        model: TaskMoEModel,
        splits: Mapping[int, TaskSplit],
        shots: Mapping[int, Shots],
        collate: Collator,
        config: Config,
        settings: AdaptSettings,
        seed: int,
    ) -> None:
        self.model, self.splits, self.shots, self.collate = model, splits, shots, collate
        self.config, self.settings, self.seed = config, settings, seed
        self.device = next(model.parameters()).device
        main = settings.learning_rate or config.learning_rate
        router = settings.router_learning_rate
        if router is None and settings.learning_rate is None:
            router = config.router_learning_rate
        if router is None:
            router = ROUTER_FACTOR * main
        self.rates = {"router": router, "task_embedding": router}
        self.main = main

    def fit(self, owned: OwnRows, advance: Callable[[], None] = lambda: None) -> dict[int, Fitted]:
        """Train ``owned``: each task by the mean loss of its own targets, until its validation rows get no
        better; what was best stays. Everything else is as it was, to the bit.

        AdamW with the run's betas, weight decay, schedule and label smoothing, without clipping: the tasks
        share no norm.

        Args:
            advance: called after each step.
        """
        settings, tasks = self.settings, owned.tasks
        best = {t: owned.take(t) for t in tasks}
        losses = self._validate(tasks)
        found = {t: Fitted(0, losses.get(t), losses.get(t)) for t in tasks}
        waited, active = dict.fromkeys(tasks, 0), list(tasks)
        owned.train()
        optimizer = build_optimizer(self.config, owned.groups)
        streams = {t: self._stream(t) for t in tasks}
        torch.manual_seed(self.seed)  # dropout
        for step in range(settings.max_steps):
            self.model.routing.seed, self.model.routing.step = self.seed, step
            self._step(optimizer, step, {t: next(streams[t]) for t in active})
            advance()
            last = step + 1 == settings.max_steps
            if not last and (step + 1) % settings.eval_steps:
                continue
            losses = self._validate(active)
            for t in list(active):
                before = found[t].after
                if before is None or losses[t] < before:
                    best[t], waited[t] = owned.take(t), 0
                    found[t] = Fitted(step + 1, found[t].before, losses.get(t))
                else:
                    waited[t] += 1
                    if waited[t] >= settings.early_stopping_patience:
                        active.remove(t)
            if not active:
                break
        owned.put(best)
        self.model.set_trainable(())
        self.model.eval()
        return found

    def _step(self, optimizer: torch.optim.Optimizer, step: int, rows: Mapping[int, Sequence[int]]) -> None:
        total = self.settings.max_steps
        # Counted from one, so that of few steps none is spent at a rate of zero.
        schedule = SCHEDULES[self.config.lr_scheduler_type]
        factor = schedule(step + 1, total + 1, warmup_steps(self.config, total))
        for group in optimizer.param_groups:
            group["lr"] = factor * self.rates.get(group["name"], self.main)
        self.model.train()
        optimizer.zero_grad()
        for batch in self._batches(rows.items()):
            losses_n, tasks_n = self._losses(batch, self.config.label_smoothing_factor)
            counts_T = torch.bincount(tasks_n)
            (losses_n / counts_T[tasks_n]).sum().backward()
        optimizer.step()

    @torch.no_grad()
    def _validate(self, tasks: Sequence[int]) -> dict[int, float]:
        self.model.eval()
        size = self.config.per_device_eval_batch_size
        rows = {t: self.shots[t].validation for t in tasks}
        parts = [(t, own[at : at + size]) for t, own in rows.items() for at in range(0, len(own), size)]
        sums, counts = defaultdict[int, float](float), Counter[int]()
        for batch in self._batches(parts):
            losses_n, tasks_n = self._losses(batch, 0.0)
            for t in tasks_n.unique().tolist():
                mine_n = losses_n[tasks_n == t].double()
                sums[t] += float(mine_n.sum())
                counts[t] += len(mine_n)
        return {t: total / counts[t] for t, total in sums.items()}

    def _losses(self, batch: dict[str, Any], smoothing: float) -> tuple[Tensor, Tensor]:
        inputs = model_inputs(batch, self.config.task_type, self.model.config, self.device)
        losses_n, tasks_n, _ = token_losses(
            self.model(**inputs).logits, batch, self.config.task_type, smoothing
        )
        return losses_n, tasks_n

    def _batches(self, parts: Iterable[tuple[int, Sequence[int]]]) -> Iterator[dict[str, Any]]:
        """Each task's rows in one batch, with those of others up to ``per_device_eval_batch_size``."""
        most = self.config.per_device_eval_batch_size
        waiting: list[dict[str, Any]] = []
        for task, own in parts:
            if waiting and len(waiting) + len(own) > most:
                yield self.collate(waiting)
                waiting = []
            waiting += [{**self.splits[task].tokens[i], "task": task} for i in own]
        if waiting:
            yield self.collate(waiting)

    def _stream(self, task: int) -> Iterator[list[int]]:
        """Rows of each step: the shots in a new order each time they are through, of task and seed alone."""
        rng = random.Random(f"{self.seed}:{self.model.tasks.names[task]}:order")
        own = self.shots[task].train
        size, order = min(self.settings.per_device_train_batch_size, len(own)), list[int]()
        while True:
            while len(order) < size:
                order += rng.sample(own, len(own))
            yield order[:size]
            order = order[size:]
