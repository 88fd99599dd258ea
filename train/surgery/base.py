"""What every way of combining task gradients shares: signature, random stream, check of the options.

Shapes: T tasks (rows of the Jacobian), P trainable parameters.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError

# (gramian_TT fp64 on the CPU, mean diagonal 1, no zero row; this step's generator; the rows' task ids)
# -> weights_T fp64. The combined gradient is J' w.
Method = Callable[[Tensor, torch.Generator, Sequence[int]], Tensor]

_Built = TypeVar("_Built")


class SurgeryError(RuntimeError):
    """Gradients that no combination can be made of; the message names the step and the tasks."""


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: a function of (seed, step), so equal on all ranks and after a resume.

    Args:
        seed, step: integers >= 0.
    """
    word = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word))


def build(registry: Mapping[str, Callable[..., _Built]], name: str, options: Mapping[str, Any]) -> _Built:
    """``registry[name](**options)``.

    Raises:
        ConfigError: an unknown name, or an option that this method does not take; it names the nearest.
    """
    if name not in registry:
        near = difflib.get_close_matches(str(name), registry, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"surgery.method: {name!r} is not one of {', '.join(registry)}; the nearest is {near!r}"
        )
    known = list(inspect.signature(registry[name]).parameters)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"surgery.options.{option}: {name!r} has no such option; {takes}")
    return registry[name](**options)


def number(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> float:
    """An option that must be a finite number in [low, high] (or (low, high]).

    Raises:
        ConfigError: it is not.
    """
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (ok and low <= value <= high and not (open_low and value == low)):
        bracket = "(" if open_low else "["
        raise ConfigError(
            f"surgery.options.{name}: {value!r} is no finite number in {bracket}{low:g}, {high:g}]"
        )
    return float(value)


def check_finite(gramian_TT: Tensor, step: int, rows: Sequence[int]) -> None:
    """Raises SurgeryError, naming the tasks whose gradient is not finite (or else whose products are not)."""
    bad_TT = ~torch.isfinite(gramian_TT)
    if not bad_TT.any():
        return
    bad_T = bad_TT.diagonal() if bad_TT.diagonal().any() else bad_TT.any(1)
    tasks = ", ".join(str(rows[t]) for t in bad_T.nonzero().squeeze(1).tolist())
    raise SurgeryError(
        f"step {step}: the gradient of task {tasks} is not finite; look at its loss and the learning rate"
    )


def check_same_run(state: Mapping[str, Any], name: str, seed: int) -> None:
    """Raises ConfigError if a state was saved under another method or another seed."""
    for setting, found, own in (("method", state["name"], name), ("seed", state["seed"], seed)):
        if found != own:
            raise ConfigError(
                f"surgery.{setting}: the checkpoint has {found!r}, this run {own!r}; resume with the same one"
            )
