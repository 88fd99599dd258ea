"""Vectors of tasks that are given and do not train.

Legend: T tasks, Tb those of this batch, D task vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.files import KEY, read_vectors
from taskmoe.moe.tasks import TaskTable


class FrozenVectors(nn.Module):
    """A given vector for each task: of a text encoder, Fisher information, or else (Ye, Zha, Ren 2022).

    vectors_TD: [T, D] float32. centre_D, spread_D: mean and standard deviation of each number over the tasks
    that training began with (``normalise``); 0 and 1 where that was one task. All are buffers, saved with the
    adapter. A task that is added later takes its vector from the file.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    task_dims: ClassVar[dict[str, int]] = {"vectors_TD": 0}
    trains: ClassVar[bool] = False
    vectors_TD: Tensor
    centre_D: Tensor
    spread_D: Tensor

    @dataclass(frozen=True)
    class Options:
        """Where they are."""

        path: str | None = None  # a .safetensors or .json file, {task name: vector}
        normalise: bool = False  # each number to mean 0 and variance 1 over the tasks

    @classmethod
    def check(cls, config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError where no file is named."""
        if options.path is None:
            raise none_given(cls.without())

    def __init__(self, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__()
        options = options_of("representation", config, type(self))
        if options.path is None:
            raise none_given(self.without())
        vectors_TD = vectors_of(options.path, tasks)
        self.register_buffer("vectors_TD", vectors_TD)
        self.dim, self.normalise = vectors_TD.shape[1], options.normalise
        if self.normalise:
            # One task has no spread to go by: less its own mean it would be zeros, and say nothing.
            spread_D = vectors_TD.std(0, correction=0)
            centre_D = vectors_TD.mean(0) if len(tasks) > 1 else torch.zeros_like(spread_D)
            self.register_buffer("centre_D", centre_D)
            self.register_buffer("spread_D", torch.where(spread_D > 0, spread_D, 1.0))

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> [Tb, D]."""
        vectors_TD = self.vectors_TD.index_select(0, tasks)
        return (vectors_TD - self.centre_D) / self.spread_D if self.normalise else vectors_TD

    @staticmethod
    def without() -> str:
        """What to do where no file is named."""
        return "name a .safetensors or .json file of {task name: vector}"


class TextVectors(FrozenVectors):
    """The mean of an encoder's last hidden states over a task's training rows (TextEmb of Ye, Zha, Ren 2022).

    A training run makes the file (``taskmoe.train.task_vectors``) and fills in ``path``.
    """

    @dataclass(frozen=True)
    class Options:
        """Which encoder reads what."""

        model: str = "base"  # base: the run's own model before training; or a folder or name on the hub
        rows: int = 100  # of each task, the first of its training split
        targets: bool = False  # whether the answers are read too
        path: str | None = None  # vectors made before; None: the run makes them
        normalise: bool = True  # each number to mean 0 and variance 1 over the tasks

    @staticmethod
    def idle(options: Options) -> dict[str, str]:
        """Nothing is made where a file is named."""
        made = "path names vectors that are made already"
        return {} if options.path is None else dict.fromkeys(("model", "rows", "targets"), made)

    @classmethod
    def check(cls, config: TaskMoEConfig, options: Any) -> None:
        """No file need be named before a run has made it."""

    @staticmethod
    def without() -> str:
        return "a training run makes it; elsewhere name the file that taskmoe.train.task_vectors has made"


def none_given(advice: str) -> ConfigError:
    """That no file of vectors is named."""
    return ConfigError(f"{KEY}: none given; {advice}")


def vectors_of(path: str, tasks: TaskTable) -> Tensor:
    """[T, D] float32 on the CPU, read from a file.

    Raises:
        ConfigError: one that is not readable, or a task that is not in it.
    """
    found = read_vectors(path)
    missing = [n for n in tasks.names if n not in found]
    if missing:
        raise ConfigError(
            f"{KEY}: {path}: no vector for task {missing[0]!r} ({len(missing)} of {len(tasks)} are missing)"
        )
    return torch.stack([found[n] for n in tasks.names])
