"""From the sampler's stream of rows to the micro-batches of a step, the same for any number of ranks.

One optimiser step takes ``G = per_device_train_batch_size * gradient_accumulation_steps * ranks`` rows of the
stream. With ``data.group_by_length_window: W`` the rows of W steps are regrouped by length, then handed out
in a seeded order: which rows meet in a step depends on the seed and on G alone. Inside a step rows are sorted
by length, so that the micro-batches waste little padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from taskmoe.train.config import Config, ConfigError
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Batch, Collator
from taskmoe.train.distributed import Ranks
from taskmoe.train.mixing import MixtureSampler, rates
from taskmoe.train.schedule import Phase


class StepBatches:
    """The micro-batches of this rank, step after step; resumable to the row.

    Args:
        splits: the training split of each task.
        sampler: where rows come from.
        collate: rows of one micro-batch -> Batch.
        per_device: rows of one micro-batch; accumulation: micro-batches of a step and rank.
        window: steps over which rows are regrouped by length; 1: each step on its own.
    """

    def __init__(
        self,
        splits: Sequence[TaskSplit],
        sampler: MixtureSampler,
        collate: Collator,
        per_device: int,
        accumulation: int,
        rank: int,
        world_size: int,
        window: int,
        seed: int,
    ) -> None:
        self.splits, self.sampler, self.collate = splits, sampler, collate
        self.per_device, self.accumulation = per_device, accumulation
        self.rank, self.world_size, self.window, self.seed = rank, world_size, max(1, window), seed
        self.lengths = [np.asarray(s.tokens["length"], dtype=np.int64) for s in splits]
        self._start: dict[str, Any] = sampler.state_dict()  # of the sampler before the open window
        self._steps: list[list[tuple[int, int]]] = []
        self._size = self._done = 0  # steps of the open window: all, handed out

    def next_step(self, steps_left: int) -> list[Batch]:
        """This rank's micro-batches of the next optimiser step.

        Args:
            steps_left: steps until the mixture may change, with this one; a window does not reach past it.
        """
        if self._done == self._size:
            self._open(min(self.window, steps_left))
        rows = self._steps[self._done]
        self._done += 1
        batches = []
        for micro in range(self.accumulation):
            chunk = micro * self.world_size + self.rank
            part = rows[chunk * self.per_device : (chunk + 1) * self.per_device]
            batches.append(self.collate([{**self.splits[t].tokens[r], "task": t} for t, r in part]))
        return batches

    def _open(self, size: int) -> None:
        self._start = self.sampler.state_dict()
        self._size, self._done = size, 0
        G = self.per_device * self.accumulation * self.world_size
        drawn = self.sampler.draw(G * size)
        drawn.sort(key=lambda row: self.lengths[row[0]][row[1]])  # stable: equal lengths keep the drawn order
        steps = [drawn[i * G : (i + 1) * G] for i in range(size)]
        key = [self.seed, int(self._start["position"]), 3]
        self._steps = [steps[i] for i in np.random.default_rng(key).permutation(size)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the sampler before the open window, and how much of the window is done."""
        return {"sampler": self._start, "size": self._size, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the number of ranks may differ if G is the same."""
        self.sampler.load_state_dict(state["sampler"])
        self._start = self.sampler.state_dict()
        if state["size"]:
            self._open(int(state["size"]))
            self._done = int(state["done"])


def rows_per_step(config: Config, ranks: Ranks) -> int:
    """G, the rows of one optimiser step over all ranks."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.world_size


def build_batches(
    config: Config,
    ranks: Ranks,
    phases: Sequence[Phase],
    splits: Sequence[TaskSplit],
    names: Sequence[str],
    collate: Collator,
) -> StepBatches:
    """The batches of a run, at the rates of its first phase.

    Raises:
        ConfigError: the mixture of any phase cannot be used, for example because it names an unknown task.
    """
    sizes = [len(s.tokens) for s in splits]
    shares = []
    for i, phase in enumerate(phases):
        try:
            steps = max(1, phase.steps)  # a run may have none, and draws nothing then
            shares.append(rates(phase.mixing, sizes, names, steps * rows_per_step(config, ranks)))
        except ConfigError as error:
            where = f"phases.{i}." if config.phases[i].mixing is not None else ""
            raise ConfigError(f"{where}{error}") from error
    return StepBatches(
        splits,
        MixtureSampler(sizes, shares[0], config.seed),
        collate,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
        config.data.group_by_length_window,
        config.seed,
    )
