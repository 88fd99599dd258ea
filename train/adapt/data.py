"""The rows of new tasks, behind the tasks of a run, and the few of them that are learned from."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taskmoe.moe import TaskTable
from taskmoe.train.adapt.settings import AdaptError, AdaptSettings
from taskmoe.train.config import Config, DatasetConfig
from taskmoe.train.data.bundle import (
    DataBundle,
    RawBundle,
    Say,
    TaskSplit,
    read_tasks,
    to_stderr,
    tokenise,
)
from taskmoe.train.data.sources import SPLITS, find_sources
from taskmoe.train.instances import with_instances
from taskmoe.train.trained_run import OpenRun


@dataclass(frozen=True)
class NewTasks:
    """table: the run's tasks, then the new ones. ids: of these. bundle: their rows, none of the others'.
    eval_split: the split that is scored. config: the run's, whose data are the run's and the new ones."""

    table: TaskTable
    ids: list[int]
    bundle: DataBundle
    eval_split: str
    config: Config

    def train(self, task: int) -> TaskSplit:
        """The rows that shots are drawn from."""
        return self.bundle.splits["train"][task]


def read_new_tasks(run: OpenRun, settings: AdaptSettings, say: Say = to_stderr) -> NewTasks:
    """Read and tokenise the new tasks.

    Raises:
        AdaptError: a task that the run knows already, or no rows to score.
        ConfigError, DataError: as :func:`taskmoe.train.data.bundle.read_tasks`.
    """
    config = run.config
    entries = _entries(config, settings)
    gym = _gym(config, settings)
    data = replace(config.data, root=None, skill_gym=gym, max_rows_per_task=None)
    reading = replace(config, datasets=entries, data=data)
    raw = read_tasks(reading, SPLITS, run.tasks, say=say, append=True)
    known = len(run.tasks)
    for entry in entries:
        if entry.name in run.tasks:
            raise AdaptError(
                f"datasets: {entry.name!r} is a task of the run; give the new task another name, or go on "
                "training"
            )
    if len(raw.tasks) == known:
        raise AdaptError("datasets: all tasks of the file are tasks of the run; there is nothing to adapt to")
    fresh = {s: [[] if t < known else rows for t, rows in enumerate(of)] for s, of in raw.splits.items()}
    ids = list(range(known, len(raw.tasks)))
    scored = next((s for s in ("test", "validation") if all(fresh[s][t] for t in ids)), None)
    if scored is None:
        raise AdaptError("datasets: not every new task has a test split, nor a validation split, to score")
    bundle = tokenise(RawBundle(raw.tasks, fresh, raw.skipped), run.tokenizer, reading, say=say)
    both = replace(
        config,
        datasets=(*_own_entries(config), *entries),
        data=replace(config.data, root=None, skill_gym=gym or _own_gym(config)),
        evaluation=replace(config.evaluation, max_rows=settings.max_eval_rows),
    )
    return NewTasks(raw.tasks, ids, with_instances(bundle, config), scored, both)


def _entries(config: Config, settings: AdaptSettings) -> tuple[DatasetConfig, ...]:
    entries = settings.datasets
    if settings.root is not None:
        data = replace(config.data, root=settings.root)
        entries = _folders(replace(config, datasets=entries, data=data))
    template = settings.template
    return tuple(e if e.template or template is None else replace(e, template=template) for e in entries)


def _folders(config: Config) -> tuple[DatasetConfig, ...]:
    """The folders of ``data.root`` as entries of ``datasets``."""
    return tuple(replace(source.config, task_column="") for source in find_sources(config))


def _own_entries(config: Config) -> tuple[DatasetConfig, ...]:
    root = config.data.root
    if root is None:
        return config.datasets
    return _folders(config) if Path(root).is_dir() else ()


def _own_gym(config: Config) -> Any:
    return config.data.skill_gym if config.data.root is None else None


def _gym(config: Config, settings: AdaptSettings) -> Any:
    """The run's skill gym with its unseen compositions among its tasks: they come behind the others."""
    count = settings.skill_gym_unseen
    if not count:
        return None
    own = _own_gym(config)
    if own is None:
        raise AdaptError("skill_gym_unseen: the run has no data.skill_gym; name datasets")
    return replace(own, num_tasks=own.num_tasks + count, unseen_tasks=max(0, own.unseen_tasks - count))


@dataclass(frozen=True)
class Shots:
    """Rows of one task's training split, by number: those that are learned from, those that say when to
    stop."""

    train: list[int]
    validation: list[int]

    @property
    def all(self) -> list[int]:
        return [*self.train, *self.validation]


def draw_shots(split: TaskSplit, name: str, shots: int | None, seed: int, validation: float = 0.25) -> Shots:
    """Draw ``shots`` rows of a task (None: all), of labels as evenly as there are rows of them.

    The first 16 of 64 shots are the 16 of the same seed. ``validation`` of them are kept apart, at least one
    where there are two, and never all.

    Raises:
        AdaptError: the task has fewer rows.
    """
    rows = list(range(len(split.tokens)))
    if shots is not None and shots > len(rows):
        raise AdaptError(f"--shots {shots}: task {name!r} has {len(rows)} training rows; give at most that")
    random.Random(f"{seed}:{name}").shuffle(rows)
    chosen = _by_turns(rows, [split.raw[i]["label"] for i in rows])[:shots]
    kept = 0
    if validation and len(chosen) > 1:
        kept = min(max(1, round(validation * len(chosen))), len(chosen) - 1)
    return Shots(chosen[: len(chosen) - kept], chosen[len(chosen) - kept :])


def _by_turns(rows: Sequence[int], labels: Sequence[str | None]) -> list[int]:
    """One of each label, then another of each; where there are no labels, as they come."""
    seen: dict[str | None, int] = defaultdict(int)
    turns = []
    for place, label in enumerate(labels):
        turns.append((seen[label] if label is not None else 0, place))
        seen[label] += 1
    return [rows[place] for _, place in sorted(turns)]
