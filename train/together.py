"""An error of one rank, raised on all: else the others wait for a rank that has gone, and die of that."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from taskmoe.train.distributed import Ranks, gather_objects

Value = TypeVar("Value")


def raise_together(error: Exception | None) -> None:
    """A collective. When a rank has an error, every rank raises: its own, or that of the first one."""
    errors = gather_objects(None if error is None else _portable(error))
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise error or first


@contextmanager
def as_one() -> Iterator[None]:
    """What one rank raises inside, all raise. Nothing inside may wait for another rank."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # of whatever kind: the others must hear of it
        error = raised
    raise_together(error)


def main_first(ranks: Ranks, action: Callable[[], Value]) -> Value:
    """The value of ``action``, called on rank 0 and then, when it went well there, on the others."""
    values: list[Value] = []
    for turn in (True, False):
        with as_one():
            if ranks.is_main is turn:
                values.append(action())
    return values[0]


def _portable(error: Exception) -> Exception:
    """The error, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class does when it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
