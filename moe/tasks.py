"""The table of tasks: ids are positions, and positions never change."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SLUG = re.compile(r"[a-z0-9_-]{1,64}")


class TaskError(ValueError):
    """A task that does not exist, exists twice, or does not fit the table of a checkpoint."""


@dataclass(frozen=True)
class Task:
    """One task. ``labels``: its classes in the order of their ids (classification), else None."""

    name: str
    slug: str
    labels: tuple[str, ...] | None = None
    group: str | None = None


def slugify(name: str, taken: Iterable[str] = ()) -> str:
    """A name that is safe in a path and a metric key: ``[a-z0-9_-]{1,64}``, not in ``taken``."""
    base = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")[:56] or "task"
    taken, slug, n = set(taken), base, 1
    while slug in taken:
        n += 1
        slug = f"{base}-{n}"
    return slug


# Beside the tasks' keys stand those of their mean, eval/macro/<metric>, and of their score, eval/score.
RESERVED = ("macro", "score")


class TaskTable:
    """An append-only list of tasks; a task's id is its position.

    >>> table = TaskTable.from_names(["Boolean QA", "sum"])
    >>> table.id("sum"), table[0].slug
    (1, 'boolean-qa')
    """

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._tasks: list[Task] = []
        self._ids: dict[str, int] = {}
        for task in tasks:
            self._append(task)

    @classmethod
    def from_names(cls, names: Iterable[str]) -> TaskTable:
        """A table of tasks without labels.

        Raises:
            TaskError: an empty or repeated name, or one string in place of a list of names.
        """
        if isinstance(names, str):
            raise TaskError(f"tasks are {names!r}, one string; give a list of names")
        table = cls()
        for name in names:
            table.add(name)
        return table

    def add(self, name: str, labels: Iterable[str] | None = None, group: str | None = None) -> int:
        """Append a task and return its id.

        Raises:
            TaskError: the name is empty or already in the table.
        """
        taken = [*RESERVED, *(t.slug for t in self._tasks)]
        slug = slugify(name, taken) if isinstance(name, str) else ""
        self._append(Task(name, slug, None if labels is None else tuple(labels), group))
        return len(self._tasks) - 1

    def _append(self, task: Task) -> None:
        if not isinstance(task.name, str) or not task.name.strip():
            raise TaskError(f"task name {task.name!r} is not a text with letters; give every task a name")
        if task.name.encode(errors="ignore").decode() != task.name:
            raise TaskError(f"task name {task.name!r} holds half a character; write it whole")
        if task.name in self._ids:
            raise TaskError(f"task {task.name!r} is in the table twice; names must be unique")
        if not SLUG.fullmatch(task.slug):
            raise TaskError(f"task {task.name!r}: slug {task.slug!r} is not of the form [a-z0-9_-]{{1,64}}")
        if any(t.slug == task.slug for t in self._tasks):
            raise TaskError(f"task {task.name!r}: slug {task.slug!r} is in the table twice; slugs name files")
        self._ids[task.name] = len(self._tasks)
        self._tasks.append(task)

    def id(self, name: str) -> int:
        """The id of a task.

        Raises:
            TaskError: no such task; the message lists the nearest names.
        """
        if name not in self._ids:
            near = difflib.get_close_matches(name, self._ids, n=3, cutoff=0.4) or list(self._ids)[:5]
            raise TaskError(
                f"unknown task {name!r}; the nearest of {len(self)} are {', '.join(near) or 'none'}"
            )
        return self._ids[name]

    def require_prefix_of(self, other: TaskTable) -> None:
        """Check that ``other`` is this table with tasks appended (a checkpoint's table must be a prefix).

        Raises:
            TaskError: names the tasks that differ.
        """
        for i, task in enumerate(self._tasks):
            if i >= len(other):
                missing = ", ".join(t.name for t in self._tasks[i:])
                raise TaskError(f"the checkpoint has tasks that are missing here: {missing}; tasks only grow")
            if other[i].name != task.name:
                raise TaskError(
                    f"task {i} is {other[i].name!r} here but {task.name!r} in the checkpoint; "
                    "keep the checkpoint's tasks first, in their order, and append new ones"
                )
            if task.labels is not None and other[i].labels != task.labels:
                raise TaskError(
                    f"task {task.name!r} has labels {other[i].labels} here "
                    f"but {task.labels} in the checkpoint"
                )

    @property
    def names(self) -> list[str]:
        return [t.name for t in self._tasks]

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, i: int) -> Task:
        return self._tasks[i]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskTable) and self._tasks == other._tasks

    __hash__ = None  # type: ignore[assignment]  # mutable

    def save(self, path: str | Path) -> None:
        """Write ``task_map.json``."""
        rows = [asdict(task) for task in self._tasks]
        Path(path).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TaskTable:
        """Read ``task_map.json``.

        Raises:
            TaskError: the file is missing or not a task table.
        """
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                Task(
                    r["name"],
                    r["slug"],
                    None if r.get("labels") is None else tuple(r["labels"]),
                    r.get("group"),
                )
                for r in rows
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(f"{path}: not a readable task table ({error})") from error
