"""Vectors of tasks made from gradients."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.representations.frozen import FrozenVectors, TextVectors


class FisherVectors(FrozenVectors):
    """The diagonal of the base's Fisher information over a task's training rows, in a few numbers (TaskEmb of
    Vu et al. 2020, arXiv 2005.00770; Achille et al. 2019, arXiv 1902.03545).

    A training run makes the file (``taskmoe.train.fisher``) and fills in ``path``.
    """

    @dataclass(frozen=True)
    class Options:
        """Of which parameters, over which rows."""

        parameters: str = ".*"  # a pattern that must fit the whole name of a parameter of the base
        rows: int = 100  # of each task, the first of its training split; a backward pass each
        dim: int = 128  # numbers of a vector: cells into which the diagonal is added, with random signs
        path: str | None = None  # vectors made before; None: the run makes them
        normalise: bool = True  # each number to mean 0 and variance 1 over the tasks

    without = staticmethod(TextVectors.without)

    @staticmethod
    def idle(options: Options) -> dict[str, str]:
        """Nothing is made where a file is named."""
        made = "path names vectors that are made already"
        return {} if options.path is None else dict.fromkeys(("parameters", "rows", "dim"), made)

    @classmethod
    def check(cls, config: TaskMoEConfig, options: Any) -> None:
        """Raises ConfigError for numbers below one and for what is no pattern; a file need not be named."""
        key = "moe.representation_options"
        for name in ("rows", "dim"):
            if getattr(options, name) < 1:
                raise ConfigError(f"{key}.{name}: {getattr(options, name)}; give a positive number")
        try:
            re.compile(options.parameters)
        except re.error as error:
            raise ConfigError(f"{key}.parameters: {options.parameters!r} is no pattern: {error}") from error
