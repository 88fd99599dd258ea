"""``taskmoe predict RUN --task NAME``: what a trained run says to rows that come one after another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import datasets
import torch
from rich.console import Console
from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from taskmoe.moe import TaskTable
from taskmoe.train.adapt.unknown import route_unknown, settings_with, told
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_io import load
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.questions import QuestionReader
from taskmoe.train.data.readers import read_jsonl_lines
from taskmoe.train.instances import COLUMN, InstanceEncoder, router_options
from taskmoe.train.output import json_line
from taskmoe.train.predict import Predictor
from taskmoe.train.run_eval import stdout_is_stderr
from taskmoe.train.run_folder import CONFIG
from taskmoe.train.trained_run import ALONE, OpenRun, open_run

WINDOW = 8  # batches that are read ahead, so that rows of one length run together
# Of a token row, what a forward pass without an answer reads.
TOKENS = ("input_ids", "length", "prompt_length", "label")


class Waiting(NamedTuple):
    """A row that was read: with its canonical row and its tokens, or with why it has none."""

    row: dict[str, Any]
    question: dict[str, Any]
    tokens: dict[str, Any]
    error: DataError | None = None


class TaskPredictor:
    """One task of a run, loaded to answer.

    Args:
        run: a run folder, or one of its checkpoints.
        task: a task of it.
        overrides: settings as on a command line, on top of the run's own, but for those of ``moe``.
        column: where answers stand in the rows that come back.
        unknown: what becomes of a task that the run does not know, a name of
            :data:`taskmoe.train.adapt.unknown.POLICIES`.

    Raises:
        ConfigError, CheckpointError, StateError: as :func:`taskmoe.train.trained_run.load_run`.
        TaskError: no such task, under ``error``; names the nearest.
        AdaptError: a run that cannot serve tasks that it does not know.
    """

    def __init__(
        self,
        run: str,
        task: str,
        overrides: Sequence[str] = (),
        column: str = "prediction",
        unknown: str = "error",
    ) -> None:
        opened = open_run(run, overrides)
        self.config, self.column = _settings(opened, overrides), column
        self.known, self.unknown, tasks = opened.tasks, unknown, TaskTable(opened.tasks)
        config = self.config
        if unknown != "error" and task not in tasks:
            tasks.add(task)
            config = replace(config, moe=settings_with(config, opened.tasks, [task], unknown))
        self.task = tasks.id(task)
        self.reader = QuestionReader(self.config, opened.tokenizer, task)
        loaded = opened.load(tasks, config)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer = loaded.model.to(device), opened.tokenizer
        labels = [len(t.labels or ()) for t in tasks]
        self.collator = Collator(self.tokenizer, self.config.task_type, len(labels), labels)
        options = router_options(self.config)
        self.encoder = None if options is None else InstanceEncoder(options.encoder, options.dim)
        self.left_out: Counter[str] = Counter()  # reason -> rows so far
        self.routed = task in self.known  # where its rows say where it goes, once some are read

    def __call__(self, lines: Iterable[bytes], name: str = "stdin") -> Iterator[dict[str, Any]]:
        """The row of each line with its answer in ``column``, in order, some batches behind.

        Under ``data.on_bad_row: skip`` and ``data.on_long_row: skip`` such a row has null there, and what is
        wrong with it in ``<column>_error``.

        Args:
            lines: JSON lines. name: of their source, for errors.

        Raises:
            DataError: a bad row, after the answers to those before it.
        """
        window: list[Waiting] = []
        for where, item in read_jsonl_lines(lines, name):
            try:
                window.append(self._read(item, where))
            except DataError:
                yield from self._answer(window)
                raise
            if len(window) == WINDOW * self.config.per_device_eval_batch_size:
                yield from self._answer(window)
                window = []
        yield from self._answer(window)

    def _read(self, item: dict[str, Any] | DataError, where: str) -> Waiting:
        row = {} if isinstance(item, DataError) else item
        try:
            if isinstance(item, DataError):
                raise item
            if self.column in item:
                raise DataError(
                    f"the row has a column {self.column!r}; name another for the answers with --column", where
                )
            return Waiting(row, *self.reader(item, where))
        except DataError as error:
            data = self.config.data
            rule = data.on_long_row if error.reason.startswith("longer") else data.on_bad_row
            if rule != "skip":
                raise
            self.left_out[error.reason] += 1
            return Waiting(row, {}, {}, error)

    def _answer(self, window: Sequence[Waiting]) -> Iterator[dict[str, Any]]:
        asked = [waiting for waiting in window if waiting.error is None]
        answers: Iterator[Any] = iter(())
        if asked:
            with stdout_is_stderr():
                answers = iter(self._predict(asked))
        for row, _, _, error in window:
            if error is None:
                yield {**row, self.column: next(answers)}
            else:
                yield {**row, self.column: None, f"{self.column}_error": str(error)}

    def _route(self, asked: Sequence[Waiting]) -> None:
        """Send a task that is not known where the policy says, by the rows that were read first."""
        name, self.routed = self.model.tasks.names[self.task], True
        texts = {name: [w.question["prompt"] for w in asked]}
        found = route_unknown(self.model, self.known, texts, self.unknown, self.config)
        print(f"taskmoe: {told(name, found)}", file=sys.stderr)

    def _predict(self, asked: Sequence[Waiting]) -> list[Any]:
        if not self.routed:
            self._route(asked)
        rows = [{name: w.tokens[name] for name in TOKENS if name in w.tokens} for w in asked]
        if self.encoder is not None:
            embeddings_nD = self.encoder([w.question["prompt"] for w in asked])
            rows = [{**row, COLUMN: of} for row, of in zip(rows, embeddings_nD.tolist(), strict=True)]
        questions = [w.question for w in asked]
        splits = {self.task: TaskSplit(self.task, datasets.Dataset.from_list(rows), questions)}
        predictor = Predictor(self.model, splits, self.tokenizer, self.config, self.collator, ALONE)
        return predictor.respond()[self.task]


def _settings(opened: OpenRun, overrides: Sequence[str]) -> Config:
    """The precision of the run, as in ``taskmoe eval``; all rows are answered.

    Raises:
        ConfigError: an override of ``moe``.
    """
    own = load(opened.home / CONFIG, ["--deepspeed=null"])
    given = load(opened.home / CONFIG, ["--deepspeed=null", *overrides])
    if given.moe != own.moe:
        raise ConfigError("moe: what the experts are is read from the checkpoint; leave its settings out")
    config, evaluation = opened.config, replace(opened.config.evaluation, max_rows=None)
    return replace(config, bf16=given.bf16, evaluation=evaluation)


def predict_stdin(run: str, task: str, overrides: Sequence[str], column: str, unknown: str = "error") -> int:
    """Answer the JSON lines of stdin on stdout, each window as soon as it is answered.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError and the others of :class:`TaskPredictor`; DataError of a bad row.
    """
    with stdout_is_stderr():
        predictor = TaskPredictor(run, task, overrides, column, unknown)
    if sys.stdin.isatty():
        print("taskmoe: reading JSON objects, one a line; end with Ctrl-D", file=sys.stderr)
    columns = (TextColumn("{task.completed} rows"), TaskProgressColumn(show_speed=True), TimeElapsedColumn())
    # On one terminal the bar and the answers would write over each other.
    hidden = sys.stdout.isatty() or not sys.stderr.isatty()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden)
    answered = 0
    with bar:
        rows = bar.add_task("", total=None)
        for row in predictor(sys.stdin.buffer):
            print(json_line(row), flush=True)
            answered += 1
            bar.update(rows, completed=answered)
    say = [f"{count} {reason}" for reason, count in predictor.left_out.items()]
    if predictor.reader.truncated:
        say.append(f"{predictor.reader.truncated} cut to data.max_length {predictor.config.data.max_length}")
    print(f"taskmoe: {', '.join([f'{answered} rows', *say])}", file=sys.stderr)
    return 0
