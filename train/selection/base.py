"""What a method of selection sees of a run or a configuration, and what it gives.

Legend: T tasks, n rows of one task, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from taskmoe.moe import TaskTable
from taskmoe.train.config import Config
from taskmoe.train.config_io import load
from taskmoe.train.data.bundle import to_stderr
from taskmoe.train.instances import InstanceEncoder
from taskmoe.train.models import build_model
from taskmoe.train.run_folder import TOKENIZER
from taskmoe.train.setup import Data, build_data
from taskmoe.train.task_vectors import text_states, texts_of_rows
from taskmoe.train.trained_run import ALONE, OpenRun, open_run

BASE = "base"  # as --encoder: the model itself


class SelectError(ValueError):
    """Tasks that cannot be compared as asked: the message says why, and what can be done."""


@dataclass(frozen=True)
class Options:
    """rows: of each task's training split, the first that are read. answers: whether texts hold the targets.
    encoder: ``hashed_words``, ``base``, or an encoder by path or name; measure: of ``divergence``."""

    rows: int = 100
    answers: bool = False
    encoder: str = "hashed_words"
    measure: str = "mmd"


@dataclass(frozen=True)
class Method:
    """One way to say how much tasks have to give each other.

    affinity: subject -> [T, T] float64, a row a target, a column a source; the larger, the sooner the source
    is chosen. NaN where nothing is known. The diagonal counts for nothing, unless ``symmetric``.
    symmetric: equal both ways, and S_tt + S_ss - 2 S_ts is a squared distance: tasks can be grouped by it.
    options: fields of :class:`Options` that it reads. reads_rows: False: a run's data may be gone.
    """

    affinity: Callable[[Subject], Tensor]
    symmetric: bool = True
    options: tuple[str, ...] = ()
    reads_rows: bool = True


class Subject:
    """The tasks that are compared, with what is known of them.

    Args:
        config: its base is the model that texts and gradients are read with.
        run: None: ``config`` is of no run yet.
        reads: whether any method reads rows; else the data are not touched, and may be gone.
        targets: names of the tasks whose row of ``affinity`` is wanted; None: all.
        advance: called after each task that a method is through with.

    Raises:
        TaskError: an unknown target. ConfigError, DataError: data that cannot be read.
    """

    def __init__(
        self,
        config: Config,
        run: OpenRun | None,
        options: Options,
        *,
        reads: bool = True,
        targets: Sequence[str] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self.config, self.run, self.options, self.advance = config, run, options, advance
        if reads or run is None:
            table, rows = self.data.bundle.tasks, self.data.bundle.splits["train"]
            self.tasks = TaskTable(t for t, split in zip(table, rows, strict=True) if len(split.tokens))
        else:
            self.tasks = run.tasks
        self.names = self.tasks.names
        self.targets = (
            list(range(len(self.names))) if targets is None else [self.tasks.id(t) for t in targets]
        )

    @cached_property
    def data(self) -> Data:
        """The training rows, tokenised."""
        run = self.run
        table, tokenizer = (None, None) if run is None else (run.tasks, run.home / TOKENIZER)
        return build_data(self.config, ALONE, ("train",), table, tokenizer, to_stderr)

    def size(self, name: str) -> int:
        """Training rows of a task."""
        bundle = self.data.bundle
        return len(bundle.splits["train"][bundle.tasks.id(name)].tokens)

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """{task: its first training rows}."""
        return texts_of_rows(self.data, self.names, self.options.rows, self.options.answers)

    @cached_property
    def states(self) -> dict[str, Tensor]:
        """{task: [n, D] float32}: of each text the base's last hidden states, averaged over its tokens."""
        model = build_model(self.config, self.data.tokenizer, self.data.bundle.tasks)
        length = self.config.data.max_length
        return text_states(model, self.data.tokenizer, self.texts, max_length=length, advance=self.advance)

    @cached_property
    def embeddings(self) -> dict[str, Tensor]:
        """{task: [n, D] float64}: its texts as ``--encoder`` has them, of unit length.

        Raises:
            ConfigError: an encoder that cannot be read.
        """
        if self.options.encoder == BASE:
            return {name: normalize(states_nD.double(), dim=1) for name, states_nD in self.states.items()}
        encoder, found = InstanceEncoder(self.options.encoder, key="--"), {}
        for name, texts in self.texts.items():
            found[name] = encoder(texts).double()
            self.advance()
        return found

    def require_rows_with_losses(self, method: str) -> None:
        """Raises SelectError where a row alone has no loss."""
        if self.config.task_type == "FEATURE_EXTRACTION":
            raise SelectError(
                f"--method {method}: it needs the loss of single rows, but task_type: FEATURE_EXTRACTION "
                "compares rows of a batch; use textemb or semb"
            )

    def require_run(self, method: str) -> OpenRun:
        """The run.

        Raises:
            SelectError: there is none yet.
        """
        if self.run is None:
            raise SelectError(f"--method {method}: it reads what a run has learned; give a run's folder")
        return self.run


def read_subject(path: str, overrides: Sequence[str]) -> tuple[Config, OpenRun | None]:
    """The settings of a run or of a YAML file, and the run.

    The base of a run's settings is what the run made of it.

    Raises:
        ConfigError, CheckpointError, StateError: neither a run nor a file of settings.
    """
    if not Path(path).is_dir():
        # As of a run, all that counts is computed in fp32.
        return replace(load(path, ["--deepspeed=null", *overrides]), bf16=False), None
    run = open_run(path, overrides)
    return replace(run.config, model=None, model_name_or_path=str(run.checkpoint)), run


def cosines(vectors: Sequence[Tensor]) -> Tensor:
    """[T, T] float64 of T vectors; 0 with a vector of zeros, and 1 with itself."""
    x_TD = normalize(torch.stack(list(vectors)).double(), dim=1)
    return (x_TD @ x_TD.T).clamp(-1, 1).fill_diagonal_(1)
