"""Methods that are chosen by name and take options, checked like other settings; random numbers by step."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from taskmoe.moe.config import ConfigError

_Built = TypeVar("_Built")


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The random numbers of one step: a function of its arguments, so equal on all ranks and after a resume.

    Args:
        seed, step: integers >= 0.
        stream: tells users of the same seed and step apart.
    """
    word = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word))


def build(
    section: str,
    registry: Mapping[str, Callable[..., _Built]],
    name: str,
    options: Mapping[str, Any],
    *given: Any,
) -> _Built:
    """``registry[name](*given, **options)``; ``section`` is where the settings stand, for messages.

    Raises:
        ConfigError: an unknown name (the nearest is named), or an option that the method does not take.
    """
    check_name(section, registry, name)
    parameters = inspect.signature(registry[name]).parameters
    known = list(parameters)[len(given) :]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{section}.options.{option}: {name!r} has no such option; {takes}")
    for option in known:
        if option not in options and parameters[option].default is inspect.Parameter.empty:
            raise ConfigError(f"{section}.options.{option}: {name!r} needs it, and it is not given")
    return registry[name](*given, **options)


def check_name(section: str, known: Iterable[str], name: str) -> None:
    """Raises ConfigError if ``name`` is not among those known; the nearest is named."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{section}.method: {name!r} is not one of {', '.join(known)}; the nearest is {near!r}"
        )


def number(key: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """A setting that must be a finite number in [low, high] (or (low, high]).

    Raises:
        ConfigError: it is not; ``key`` is named.
    """
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (ok and low <= value <= high and not (open_low and value == low)):
        upper = "" if high == math.inf else f" and <= {high:g}"
        raise ConfigError(f"{key}: {value!r} is no finite number {'>' if open_low else '>='} {low:g}{upper}")
    return float(value)


def whole(key: str, value: Any, low: int) -> int:
    """A setting that must be an integer >= low.

    Raises:
        ConfigError: it is not; ``key`` is named.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{key}: {value!r} is no integer >= {low}")
    return value


def check_same_run(section: str, state: Mapping[str, Any], name: str, seed: int) -> None:
    """Raises ConfigError if a state was saved under another method or another seed."""
    for setting, found, own in (("method", state["name"], name), ("seed", state["seed"], seed)):
        check_same(f"{section}.{setting}", found, own)


def check_same(key: str, found: Any, own: Any) -> None:
    """Raises ConfigError if a checkpoint's setting is not this run's."""
    if found != own:
        raise ConfigError(f"{key}: the checkpoint has {found!r}, this run {own!r}; resume with the same")
