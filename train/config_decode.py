"""Plain values from YAML into the settings' dataclasses, and the walks over settings."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Union

from taskmoe.moe.config import ALIASES, TaskMoEConfig
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_yaml import Origins, join

# Keys that hold text but for which `true` and `false` are words of their own.
TEXT_OR_SWITCH = ("resume_from_checkpoint",)


def hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls)}


def members(kind: Any) -> list[Any]:
    """The alternatives of a type, None left out."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [m for m in typing.get_args(kind) if m is not type(None)]
    return [kind]


def nullable(kind: Any) -> bool:
    """Whether None is a value of the type."""
    return type(None) in typing.get_args(kind)


def item_type(kind: Any) -> Any:
    """The dataclass or type of a tuple's items; None for what is not a tuple."""
    return next((typing.get_args(m)[0] for m in members(kind) if typing.get_origin(m) is tuple), None)


def section(kind: Any) -> type | None:
    """The dataclass a field holds, if it holds one."""
    return next((m for m in members(kind) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def key_name(cls: type, key: str) -> str:
    """A key under the name its field has here."""
    return ALIASES.get(key, key) if cls is TaskMoEConfig else key


def known_paths(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted path of every key; items of lists stand as ``datasets.*.path``."""
    paths = []
    for name, kind in hints(cls).items():
        path, inner, item = join(prefix, name), section(kind), item_type(kind)
        if inner is not None:
            paths += known_paths(inner, path)
        else:
            paths.append(path)
        if item is not None and section(item) is not None:
            paths += known_paths(item, path + ".*")
    return paths


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key with its path, value and default; a section that is None is one key."""
    for f in dataclasses.fields(settings):
        path, value = join(prefix, f.name), getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, path)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                yield from leaves(item, f"{path}.{i}")
        else:
            yield path, value, default_of(f)


def default_of(f: dataclasses.Field) -> Any:
    """The value of a field that nobody sets."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def nearest(word: str, known: list[str]) -> str:
    """A clause that names the key most like ``word``: the same name elsewhere, initials, or a likeness."""
    leaf = word.rsplit(".", 1)[-1]
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}  # of equal names the outermost
    near = [path for path in known if path.rsplit(".", 1)[-1] == leaf and "*" not in path]
    near = near or [path for name, path in by_leaf.items() if _initials(name) == leaf]
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.0)]
    return f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split("_") if part)


def located(at: str | None, path: str) -> str:
    """A key behind the place it was written at, where that does not say it already (``--moe.r``)."""
    return path if at is None else at if at == f"--{path}" else f"{at}: {path}"


class Decoder:
    """Checks types on the way.

    ``origins`` says where each value was written; keys that turn out to be empty are taken out of it.
    """

    def __init__(self, origins: Origins) -> None:
        self.origins = origins

    def fail(self, path: str, message: str) -> ConfigError:
        """An error that begins with the place the key was written at."""
        place, at = path, self.origins.get(path)
        while at is None and "." in place:
            place = place.rsplit(".", 1)[0]
            at = self.origins.get(place)
        return ConfigError(f"{located(at, path)}: {message}")

    def decode(self, kind: Any, value: Any, path: str) -> Any:
        """``value`` as the type asks for it.

        Raises:
            ConfigError: an unknown key or a value of another type, with its path and its place.
        """
        if value is None and nullable(kind):
            return None
        inner = section(kind)
        if inner is not None:
            return self._section(inner, value, path)
        options = members(kind)
        tuples = [m for m in options if typing.get_origin(m) is tuple]
        if tuples and (isinstance(value, list) or len(options) == 1):
            return self._tuple(tuples[0], value, path)
        plain = next(m for m in options if m not in tuples)
        if plain is dict or typing.get_origin(plain) is dict:
            return self._dict(plain, value, path)
        return getattr(self, f"_{plain.__name__}")(value, path)

    def _section(self, cls: type, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise self.fail(path, f"expected a section of keys, found {value!r}")
        kinds, given = hints(cls), {}
        for key, item in value.items():
            name, here = key_name(cls, key), join(path, key)
            if name not in kinds:
                siblings = [join(path, name) for name in kinds]
                raise self.fail(here, f"unknown key; {_nearest_key(here, siblings)}")
            if name != key and name in value:
                raise self.fail(here, f"is another name of {join(path, name)}; give one of them")
            if item is None and not nullable(kinds[name]):
                self.origins.pop(here, None)  # an empty key is as if it were not there
                continue
            given[name] = self.decode(kinds[name], item, here)
        return cls(**given)

    def _tuple(self, kind: Any, value: Any, path: str) -> tuple:
        args = typing.get_args(kind)
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, list):
            raise self.fail(path, f"expected a list, found {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise self.fail(path, f"expected a list of {len(args)}, found {value!r}")
        return tuple(self.decode(args[0], item, join(path, str(i))) for i, item in enumerate(value))

    def _dict(self, kind: Any, value: Any, path: str) -> dict:
        if not isinstance(value, dict):
            raise self.fail(path, f"expected a mapping, found {value!r}")
        args = typing.get_args(kind)
        return {k: self.decode(args[1], v, join(path, k)) if args else v for k, v in value.items()}

    def _bool(self, value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            raise self.fail(path, f"expected true or false, found {value!r}")
        return value

    def _int(self, value: Any, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e4
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(path, f"expected a whole number, found {value!r}")
        return value

    def _float(self, value: Any, path: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.fail(path, f"expected a number, found {value!r}")
        return number

    def _str(self, value: Any, path: str) -> str | None:
        if path in TEXT_OR_SWITCH and isinstance(value, bool):
            return "true" if value else None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.fail(path, f"expected text, found {value!r}; put it in quotes")
        return value


def _nearest_key(path: str, siblings: list[str]) -> str:
    """Prefer a sibling with a similar name, then the same name in another section."""
    leaves_here = [s.rsplit(".", 1)[-1] for s in siblings]
    leaf = path.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(leaf, leaves_here, n=1, cutoff=0.7)
    return (
        f"the nearest is {siblings[leaves_here.index(close[0])]}" if close else nearest(path, known_paths())
    )
