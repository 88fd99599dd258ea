"""What a method reads of the settings: flat keys that it names in ``uses``, and options of its own."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from taskmoe.moe.config import ConfigError, TaskMoEConfig

# Every key a method may read belongs to a seam's choice, but these: they hold whatever is chosen.
GENERAL = ("representation", "router", "gate", "bank", "regularisers", "modules_to_save")


def options_of(seam: str, config: TaskMoEConfig, method: Any) -> Any:
    """The ``Options`` of the method that ``config`` chooses on a seam, filled in; None if it has none.

    Args:
        seam: ``representation``, ``router``, ``gate`` or ``bank``.
        method: the chosen member of the seam's registry.

    Raises:
        ConfigError: an unknown option, or a value of another type; names the key as ``moe.<seam>_options.x``.
    """
    given = getattr(config, f"{seam}_options") or {}
    return read_options(f"moe.{seam}_options", f"{seam} {getattr(config, seam)!r}", method, given)


def read_options(key: str, who: str, method: Any, given: Mapping[str, Any]) -> Any:
    """``given`` as the ``Options`` dataclass of ``method`` (None if it has none).

    Raises:
        ConfigError: an unknown option, a value of another type, or one that the others leave without effect
            (``method.idle``), with its key.
    """
    cls = getattr(method, "Options", None)
    kinds = {} if cls is None else typing.get_type_hints(cls)
    for name, value in given.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1, cutoff=0.0)
            advice = f"the nearest is {near[0]!r}" if near else "it has none; leave it out"
            raise ConfigError(f"{key}.{name}: unknown option of {who}; {advice}")
        if not _fits(value, kinds[name]):
            wanted = str(kinds[name]).replace("<class '", "").replace("'>", "")
            raise ConfigError(f"{key}.{name}: {value!r} is not {wanted}")
    if cls is None:
        return None
    options = cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})
    for name, reason in idle(method, options).items():
        # Off is no wish: it may stand where it has no effect.
        if given.get(name) is not None and given[name] is not False:
            raise ConfigError(f"{key}.{name}: {given[name]!r} has no effect: {reason}; leave it out")
    return options


def idle(method: Any, options: Any) -> dict[str, str]:
    """{key or option: why it has no effect} of what ``method`` leaves unread with these ``options``.

    A method says so in ``idle``, a function of its filled options.
    """
    said = getattr(method, "idle", None)
    return {} if said is None else dict(said(options))


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(kind))
    if kind is type(None):
        return value is None
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)


def default_options(method: Any) -> dict[str, Any]:
    """{option: default} of a method, for the schema."""
    cls = getattr(method, "Options", None)
    if cls is None:
        return {}
    return {
        f.name: f.default if f.default is not dataclasses.MISSING else None for f in dataclasses.fields(cls)
    }
