"""The rows of one source, checked, and split into tasks."""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from taskmoe.moe.tasks import TaskTable
from taskmoe.train.config import Config
from taskmoe.train.data.errors import DataError, shorten
from taskmoe.train.data.formats import FORMATS, Row, check_settings, detect, parse_row, to_text
from taskmoe.train.data.sources import TASK_COLUMNS, Source
from taskmoe.train.data.templates import Template


@dataclass
class TaskRows:
    """Canonical rows of one task. ``where``: the file of each split, for errors about the whole of it."""

    name: str
    labels: tuple[str, ...] | None = None  # given by the config or the data set itself
    group: str | None = None
    splits: dict[str, list[Row]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def extend(self, other: TaskRows) -> None:
        """Add the rows of another source of the same task."""
        for split, rows in other.splits.items():
            self.splits.setdefault(split, []).extend(rows)
        self.labels = self.labels or other.labels
        self.group = self.group or other.group

    def label_set(self) -> tuple[str, ...] | None:
        """The given labels, else the sorted labels of the training rows (of all rows when there are none)."""
        if self.labels is not None:
            return self.labels
        rows = self.splits.get("train") or [row for rows in self.splits.values() for row in rows]
        found = {row["label"] for row in rows if row["label"] is not None}
        return tuple(sorted(found, key=_natural)) or None

    def check_labels(self, labels: tuple[str, ...] | None, on_bad_row: str, skipped: Counter[str]) -> None:
        """Every label is in the set; else stop or drop the row.

        Raises:
            DataError: the first row outside, with the nearest label.
        """
        if labels is None:
            return
        known = frozenset(labels)
        for split, rows in self.splits.items():
            bad = [row for row in rows if row["label"] is not None and row["label"] not in known]
            if not bad:
                continue
            if on_bad_row != "skip":
                label = bad[0]["label"]
                near = difflib.get_close_matches(label, labels, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"label {shorten(label)} is outside the labels of task {self.name!r}: "
                    f"{', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}{hint}",
                    bad[0]["where"],
                    "label outside the set",
                )
            skipped["label outside the set"] += len(bad)
            self.splits[split] = [row for row in rows if row["label"] is None or row["label"] in known]


def _natural(label: str) -> tuple[bool, int, str]:
    return (False, int(label), label) if label.isascii() and label.isdecimal() else (True, 0, label)


def take(rows: list[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` rows: a sample that does not change with the run's seed, in the order of the file.

    (The first rows would do harm: files are often sorted by label.)
    """
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]


def read_source(
    source: Source,
    config: Config,
    splits: tuple[str, ...],
    tasks: TaskTable | None,
    skipped: Counter[str],
    say: Callable[[str], None],
) -> list[TaskRows]:
    """The tasks of one source, in the order in which their first rows stand there.

    Raises:
        DataError: a bad row (``on_bad_row: error``) or an unreadable file.
        ConfigError: a format or template that cannot be used.
    """
    reader = _RowReader(source, config, tasks, say)
    found: dict[str, TaskRows] = {}
    for split in splits:
        lines = source.lines(split)
        if lines is None:
            continue
        pairs: list[tuple[str, Row]] = []
        for where, item in lines:
            try:
                if isinstance(item, DataError):
                    raise item
                pairs.append(reader(item, where))
            except DataError as error:
                if config.data.on_bad_row != "skip":
                    raise
                skipped[error.reason] += 1
        if split == "train":
            pairs = take(pairs, source.config.max_rows)
        # An empty file is a split without rows (an error later), not a missing split.
        for name in dict.fromkeys([name for name, _ in pairs] or ([] if reader.column else [source.name])):
            task = found.setdefault(name, TaskRows(name, group=source.config.group))
            task.splits[split] = []
            task.where[split] = str(source.files.get(split, source.config.path))
        for name, row in pairs:
            found[name].splits[split].append(row)
    if not found and not reader.column:
        found[source.name] = TaskRows(source.name, group=source.config.group)
    for task in found.values():
        task.labels = source.config.labels or source.classes.get(reader.target or "")
    return list(found.values())


class _RowReader:
    """Row to (task, canonical row). Format and task column are decided by the first row of the source."""

    def __init__(
        self, source: Source, config: Config, tasks: TaskTable | None, say: Callable[[str], None]
    ) -> None:
        self.source, self.config, self.tasks, self.say = source, config, tasks, say
        self.form = source.config.format
        self.column: str | None = source.task_column or None
        self.target: str | None = None
        own = source.config.template
        check_settings(self.form, own is not None, config.task_type, source.key)
        text, key = (
            (own, f"{source.key}.template") if own is not None else (config.data.template, "data.template")
        )
        self.template = None if text is None else Template(text, key)
        self._started = False

    def __call__(self, row: Row, where: str) -> tuple[str, Row]:
        if not self._started:
            self._start(row, where)
        name = self.source.name if self.column is None else self._task(row, where)
        labels = self.source.config.labels
        if self.tasks is not None and name in self.tasks:
            labels = labels or self.tasks[self.tasks.id(name)].labels
        labelled = (
            self.form == "text_label"
            or self.config.task_type == "SEQ_CLS"
            or labels is not None
            or self.target in self.source.classes
        )
        if self.template is not None:
            row = {"task": name, **row}  # a template may name the task, also where no column does
        return name, parse_row(row, where, self.form, self.template, self.config.task_type, labelled)

    def _start(self, row: Row, where: str) -> None:
        if self.form == "auto":
            self.form = detect(list(row), self.template is not None, where)
            check_settings(
                self.form, self.source.config.template is not None, self.config.task_type, self.source.key
            )
        self.target = FORMATS[self.form].target
        if self.source.task_column is None:
            self.column = next((c for c in TASK_COLUMNS if c in row), None)
            if self.column is not None:
                self.say(
                    f"{self.source.key}: column {self.column!r} splits {self.source.config.path} into tasks "
                    '(task_column: "" turns this off)'
                )
        self._started = True

    def _task(self, row: Row, where: str) -> str:
        assert self.column is not None
        if self.column not in row:
            raise DataError(
                f"no task column {self.column!r}; the row has {', '.join(map(str, row)) or 'no columns'}",
                where,
                "missing column",
            )
        name = to_text(row[self.column], f"task column {self.column!r}", where).strip()
        if not name:
            raise DataError(f"task column {self.column!r} is empty; name the task", where, "empty text")
        return name
