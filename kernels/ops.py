"""The torch.library ops of this folder: one a direction, functional, one implementation a device.

`TASKMOE_KERNELS`, read at each call, says which implementation runs:

- ``auto`` (default): Triton on a GPU, plain torch on the CPU;
- ``triton``: Triton wherever it can run: on a GPU, and on the CPU when ``TRITON_INTERPRET=1`` was set before
  Triton was imported (its interpreter: slow, for tests);
- ``reference``: the slow truth of reference.py, differentiated by autograd.

Where Triton is asked for and cannot run (not installed, a dtype that it does not take), plain torch does the
work and a warning says so once.

Legend: as in low_rank_cpu.py and token_cpu.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from taskmoe.kernels import low_rank_cpu, token_cpu

MODES = ("auto", "triton", "reference")
LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mode() -> str:
    """The value of ``TASKMOE_KERNELS``.

    Raises:
        ValueError: an unknown value.
    """
    value = os.environ.get("TASKMOE_KERNELS", "auto")
    if value not in MODES:
        raise ValueError(f"TASKMOE_KERNELS is {value!r}; use one of {', '.join(MODES)}")
    return value


def use_triton(x: Tensor) -> bool:
    """Whether Triton's kernels will take ``x``; warns once where they are asked for and cannot."""
    asked = mode()
    if asked == "reference" or (asked == "auto" and not x.is_cuda):
        return False
    why = _obstacle(x.device, x.dtype)
    if why is not None:
        _warn(f"the Triton kernels cannot run: {why}; plain torch matmuls do the work, more slowly on a GPU")
    return why is None


@cache
def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"they do not take {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"they need compute capability 8.0; {torch.cuda.get_device_name(device)} has less"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "on the CPU they need Triton's interpreter (TRITON_INTERPRET=1)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    return None


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _implementation(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The op ``name``: Triton or ``plain``, by the first tensor."""

    def run(first: Tensor, *rest: Any) -> Any:
        if use_triton(first):
            from taskmoe.kernels import low_rank_gpu  # needs triton

            return getattr(low_rank_gpu, name)(first, *rest)
        return plain(first, *rest)

    return run


def _empty(like: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a backward op returns: a gradient like each tensor, or nothing where it is not needed."""
    return tuple(
        t.new_empty(t.shape) if need else like[0].new_empty(0) for t, need in zip(like, needs, strict=True)
    )


def _rank(x: Tensor, columns: int) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], columns, dtype=acc)


def _low_rank_fwd(x: Tensor, y: Any, A: Tensor, B: Tensor, gates: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], B.shape[3]), _rank(x, gates.shape[1] * A.shape[2])


def _low_rank_bwd(dy: Tensor, x: Tensor, s: Any, A: Tensor, B: Tensor, gates: Tensor, *rest: Any) -> Any:
    return _empty((x, A, B, gates), rest[-1])


def _shrink_fwd(x: Tensor, A: Tensor, slots: Tensor | None, tables: Any) -> Tensor:
    return _rank(x, A.shape[2] * (A.shape[1] if slots is None else slots.shape[1]))


def _shrink_bwd(ds: Tensor, x: Tensor, A: Tensor, slots: Any, tables: Any, needs: Any) -> Any:
    return _empty((x, A), needs)


def _expand_fwd(
    s: Tensor, y: Any, B: Tensor, gates: Any, slots: Any, scale: Any, tables: Any, dtype: Any
) -> Tensor:
    return s.new_empty(s.shape[0], B.shape[3], dtype=dtype)


def _expand_bwd(
    dy: Tensor, s: Tensor, B: Tensor, gates: Tensor, slots: Any, scale: Any, tables: Any, needs: Any
) -> Any:
    ds, dB, dgates = _empty((s, B, gates), needs)
    return ds, dB, dgates


# name -> (arguments, results, plain torch, shapes)
_HEAD = "Tensor x, Tensor? y, Tensor A, Tensor B, Tensor gates"
_BACK = "Tensor dy, Tensor x, Tensor s, Tensor A, Tensor B, Tensor gates"
_TAIL = "float scale, Tensor[] tables"
_FOUR = "Tensor dx, Tensor dA, Tensor dB, Tensor dgates"
_OUT = "Tensor out, Tensor s"
OPS: dict[str, tuple[str, str, Callable[..., Any], Callable[..., Any]]] = {
    "low_rank_fwd": (f"{_HEAD}, Tensor? slots, {_TAIL}", _OUT, low_rank_cpu.low_rank_fwd, _low_rank_fwd),
    "low_rank_bwd": (
        f"{_BACK}, Tensor? slots, {_TAIL}, bool[] needs", _FOUR, low_rank_cpu.low_rank_bwd, _low_rank_bwd,
    ),
    "shrink_fwd": (
        "Tensor x, Tensor A, Tensor? slots, Tensor[] tables", "Tensor s",
        low_rank_cpu.shrink_fwd, _shrink_fwd,
    ),
    "shrink_bwd": (
        "Tensor ds, Tensor x, Tensor A, Tensor? slots, Tensor[] tables, bool[] needs", "Tensor dx, Tensor dA",
        low_rank_cpu.shrink_bwd, _shrink_bwd,
    ),
    "expand_fwd": (
        f"Tensor s, Tensor? y, Tensor B, Tensor gates, Tensor? slots, {_TAIL}, ScalarType dtype",
        "Tensor out", low_rank_cpu.expand_fwd, _expand_fwd,
    ),
    "expand_bwd": (
        f"Tensor dy, Tensor s, Tensor B, Tensor gates, Tensor? slots, {_TAIL}, bool[] needs",
        "Tensor ds, Tensor dB, Tensor dgates", low_rank_cpu.expand_bwd, _expand_bwd,
    ),
    "gated_fwd": (f"{_HEAD}, {_TAIL}", _OUT, token_cpu.gated_fwd, _low_rank_fwd),
    "gated_bwd": (f"{_BACK}, {_TAIL}, bool[] needs", _FOUR, token_cpu.gated_bwd, _low_rank_bwd),
    "grouped_fwd": (f"{_HEAD}, Tensor slots, {_TAIL}", _OUT, token_cpu.grouped_fwd, _low_rank_fwd),
    "grouped_bwd": (
        f"{_BACK}, Tensor slots, {_TAIL}, bool[] needs", _FOUR, token_cpu.grouped_bwd, _low_rank_bwd,
    ),
}  # fmt: skip


def _register() -> None:
    """Define the ops once: torch keeps them for the life of the process, whatever happens to this module."""
    if hasattr(torch.ops.taskmoe, "low_rank_fwd"):
        return
    for name, (arguments, results, plain, shapes) in OPS.items():
        results = f"({results})" if "," in results else results.split()[0]
        torch.library.define(
            f"taskmoe::{name}", f"({arguments}) -> {results}", tags=torch.Tag.pt2_compliant_tag
        )
        for device in ("cpu", "cuda"):
            torch.library.impl(f"taskmoe::{name}", device, _implementation(name, plain))
        torch.library.register_fake(f"taskmoe::{name}", shapes)


_register()
