"""All tasks of a run: raw text first (a tokenizer may be trained on it), then tokens."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taskmoe.moe.config import ConfigError
from taskmoe.moe.tasks import Task, TaskError, TaskTable
from taskmoe.train.config import Config
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.formats import Row
from taskmoe.train.data.rows import TaskRows, read_source, take
from taskmoe.train.data.skill_gym import SkillGym
from taskmoe.train.data.sources import SPLITS, find_sources

if TYPE_CHECKING:
    import datasets

Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    """The default of ``say``: standard output belongs to results."""
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class TaskSplit:
    """One task's rows of one split: ``tokens[i]`` belongs to ``raw[i]``."""

    task: int
    tokens: datasets.Dataset
    raw: Sequence[Row]


@dataclass(frozen=True)
class DataBundle:
    """Tokenised tasks; ``splits[split][t]`` is task ``t`` (it may have no rows)."""

    tasks: TaskTable
    splits: dict[str, list[TaskSplit]]
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out or cut


@dataclass(frozen=True)
class RawBundle:
    """Canonical rows (see ``formats.py``); ``splits[split][t]`` are the rows of task ``t``."""

    tasks: TaskTable
    splits: dict[str, list[list[Row]]]
    skipped: dict[str, int] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Every prompt and target of the training split."""
        for rows in self.splits.get("train", []):
            for row in rows:
                yield row["prompt"]
                yield row["target"]


def read_tasks(
    config: Config,
    splits: Sequence[str] = SPLITS,
    tasks: TaskTable | None = None,
    grow: bool | None = None,
    say: Say = to_stderr,
    append: bool = False,
) -> RawBundle:
    """Read and check every row of the wanted splits.

    Args:
        config: ``data.root``, or else ``datasets`` and ``data.skill_gym`` say what is read.
        splits: of train, validation, test; a task without one of the last two gets no rows there.
        tasks: a checkpoint's table. It gives ids and labels; tasks the data lack get no rows.
        grow: tasks that ``tasks`` lacks are appended, and the data must begin with the tasks of the table;
            else they are errors. None: grow when training rows and others are read, as a run does.
        say: takes one line at a time: skipped rows, missing splits. Pass a no-op on all ranks but one.
        append: tasks that ``tasks`` lacks stand behind it, whatever the data begin with (for adaptation).

    Raises:
        DataError: a bad row (with file:line), or a task without rows.
        ConfigError: settings that cannot go together.
        TaskError: a task that is not in ``tasks``, naming the nearest.
    """
    splits = tuple(dict.fromkeys(splits))
    grow = len(splits) > 1 and "train" in splits if grow is None else grow
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} is unknown; known are {', '.join(SPLITS)}")
    skipped: Counter[str] = Counter()
    found: dict[str, TaskRows] = {}
    for source in find_sources(config):
        for task in read_source(source, config, splits, tasks, skipped, say):
            if task.name in found:
                found[task.name].extend(task)
            else:
                found[task.name] = task
    if config.data.root is None and config.data.skill_gym is not None:
        for task in _gym_tasks(config, splits):
            if task.name in found:
                raise ConfigError(
                    f"data.skill_gym: the task {task.name!r} is in datasets too; rename that one"
                )
            found[task.name] = task
    if not found:
        raise ConfigError("no data: set data.root, datasets or data.skill_gym")
    table = _table(found, tasks, grow or append, config, skipped, tuple(tasks or ()) if append else ())
    rows = {split: [_rows_of(found.get(t.name), split, config) for t in table] for split in splits}
    _check_empty(found, rows, table, say)
    if not any(of_task for of_tasks in rows.values() for of_task in of_tasks):
        raise DataError(f"no task has rows of the split {' or '.join(splits)}; name a split that is there")
    if skipped:
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        say(f"skipped {skipped.total()} bad rows (data.on_bad_row: skip): {counts}")
    return RawBundle(table, rows, dict(skipped))


def _gym_tasks(config: Config, splits: tuple[str, ...]) -> Iterator[TaskRows]:
    if config.task_type == "SEQ_CLS":
        raise ConfigError(
            "data.skill_gym: its tasks are text to text; use task_type CAUSAL_LM or SEQ_2_SEQ_LM"
        )
    assert config.data.skill_gym is not None
    gym = SkillGym(config.data.skill_gym)
    for task in gym.tasks:
        rows = {split: gym.rows(task, split) for split in splits}
        yield TaskRows(task.name, group=task.family, splits={s: r for s, r in rows.items() if r})


def _table(
    found: dict[str, TaskRows],
    tasks: TaskTable | None,
    grow: bool,
    config: Config,
    skipped: Counter[str],
    first: Sequence[Task] = (),
) -> TaskTable:
    if tasks is not None and not grow:
        for name, task in found.items():
            task.check_labels(tasks[tasks.id(name)].labels, config.data.on_bad_row, skipped)
        return tasks
    table = TaskTable(first)
    for name, task in found.items():
        old = tasks[tasks.id(name)] if tasks is not None and name in tasks else None
        labels = old.labels if old is not None else task.label_set()
        if old is not None and task.labels is not None and set(task.labels) != set(labels or ()):
            known = ", ".join(labels or ()) or "none"
            raise TaskError(
                f"task {name!r} has labels {', '.join(task.labels)} but {known} in the checkpoint; keep those"
            )
        if config.task_type == "SEQ_CLS" and labels is None:
            raise DataError(f"task {name!r} has no labels, which task_type SEQ_CLS needs")
        task.check_labels(labels, config.data.on_bad_row, skipped)
        if name not in table:
            table.add(name, labels, task.group)
    if tasks is not None:
        tasks.require_prefix_of(table)
    return table


def _rows_of(task: TaskRows | None, split: str, config: Config) -> list[Row]:
    rows = [] if task is None else task.splits.get(split, [])
    return take(rows, config.data.max_rows_per_task) if split == "train" else rows


def _check_empty(
    found: dict[str, TaskRows], rows: dict[str, list[list[Row]]], table: TaskTable, say: Say
) -> None:
    for split, of_tasks in rows.items():
        missing = []
        for task, of_task in zip(table, of_tasks, strict=True):
            if of_task or task.name not in found:
                continue
            if split == "train" or split in found[task.name].splits:
                raise DataError(
                    f"task {task.name!r} has no {split} rows left; give it rows or take it out of the run",
                    found[task.name].where.get(split, ""),
                )
            missing.append(task.name)
        if missing and any(any(of_tasks) for of_tasks in rows.values()):  # else the error says it
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            say(f"no {split} split for {shown}: nothing is measured there (none is cut off train)")


def tokenise(raw: RawBundle, tokenizer: Any, config: Config, say: Say = to_stderr) -> DataBundle:
    """Tokenise every split, or take it from the cache (``data.cache_dir``).

    Raises:
        DataError: a row that is longer than ``data.max_length`` (or, seq2seq, a target longer than
            ``data.max_target_length``) under ``on_long_row: error``, or a row without tokens.
    """
    from taskmoe.train.data.cache import encode_task, tokenizer_fingerprint

    skipped: Counter[str] = Counter(raw.skipped)
    before = skipped.copy()
    fingerprint = tokenizer_fingerprint(tokenizer)
    splits: dict[str, list[TaskSplit]] = {}
    for split, of_tasks in raw.splits.items():
        splits[split] = []
        for task, rows in enumerate(of_tasks):
            tokens, kept = encode_task(rows, raw.tasks[task].labels, tokenizer, fingerprint, config, skipped)
            if rows and not kept:
                raise DataError(
                    f"task {raw.tasks[task].name!r} has no {split} rows left within data.max_length "
                    f"{config.data.max_length}; raise it or set data.on_long_row: truncate"
                )
            splits[split].append(TaskSplit(task, tokens, kept))
    for reason, count in (skipped - before).items():
        say(f"{count} rows {reason}")
    return DataBundle(raw.tasks, splits, dict(skipped))
