from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train.data.errors import DataError
from taskmoe.train.distributed import Ranks
from taskmoe.train.together import as_one, main_first


class Unsendable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("no pickle of this")


def fail_on(rank: int, error: Exception) -> str:
    """What a rank of the shared pair sees when rank ``rank`` fails."""
    try:
        with as_one():
            if torch.distributed.get_rank() == rank:
                raise error
        return "went on"
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"


def fail_unsendable() -> str:
    return fail_on(1, Unsendable("x"))


def order(fails: bool) -> tuple[str, float]:
    """The value and the time of an action that rank 0 runs first."""
    import time

    rank = torch.distributed.get_rank()
    calls = []

    def action() -> float:
        calls.append(rank)
        if fails and rank == 0:
            raise ConfigError("a: is wrong")
        time.sleep(0.1)
        return time.monotonic()

    try:
        return "", main_first(Ranks(rank, 2, rank, torch.device("cpu")), action)
    except ConfigError as error:
        return f"{error}, called {len(calls)} times", 0.0


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_raised_on_all(spawn_ranks: Callable, rank: int) -> None:
    error = DataError("broken", "a.jsonl:3")
    assert spawn_ranks(fail_on, rank=rank, error=error) == ["DataError: a.jsonl:3: broken"] * 2


def test_the_others_get_the_text_of_what_cannot_be_sent(spawn_ranks: Callable) -> None:
    assert spawn_ranks(fail_unsendable) == ["RuntimeError: Unsendable: x", "Unsendable: x"]


def test_rank_0_acts_first_and_alone_when_it_fails(spawn_ranks: Callable) -> None:
    (_, first), (_, second) = spawn_ranks(order, fails=False)
    assert second >= first + 0.1
    texts = [text for text, _ in spawn_ranks(order, fails=True)]
    assert texts == ["a: is wrong, called 1 times", "a: is wrong, called 0 times"]


def test_one_process_needs_nobody() -> None:
    with pytest.raises(KeyError), as_one():
        raise KeyError("x")
    assert main_first(Ranks(0, 1, 0, torch.device("cpu")), lambda: 3) == 3
