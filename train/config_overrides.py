"""``--data.max_length 256 --bf16 --r 8``: settings from a command line, put into the tree of a YAML file."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_decode import (
    hints,
    item_type,
    key_name,
    known_paths,
    located,
    members,
    nearest,
    section,
)
from taskmoe.train.config_yaml import Origins, join, parse


def split(tokens: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Command-line tokens -> ([(key, value)], the tokens that belong to no key).

    ``--key value``, ``--key=value`` and, where the key is a switch, ``--key`` alone.

    Raises:
        ConfigError: an unknown or ambiguous key, or a key without a value.
    """
    pairs, rest, i = [], [], 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if not token.startswith("--"):
            rest.append(token)
            continue
        key, equals, value = token.removeprefix("--").partition("=")
        _, kind = resolve(key)
        if not equals:
            is_switch = members(kind) == [bool]
            following = tokens[i] if i < len(tokens) else "--"
            if is_switch and following.lower() not in ("true", "false", "null"):
                value = "true"
            elif following.startswith("--"):
                raise ConfigError(f"--{key}: a value is missing; write --{key} VALUE")
            else:
                value = following
                i += 1
        pairs.append((key, value))
    return pairs, rest


def apply(tree: dict[str, Any], origins: Origins, tokens: Sequence[str]) -> None:
    """Put overrides into ``tree``; a null for a key that cannot be null takes the key out of it.

    Raises:
        ConfigError: as :func:`split`, a token that belongs to no key, a value that is not YAML, a key given
            by two names, or a list index beyond the list.
    """
    pairs, rest = split(tokens)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; settings are written --key value")
    named: dict[str, tuple[str, str]] = {}  # path: the key and the value that it was given by
    for key, text in pairs:
        parts, kind = resolve(key)
        before = named.setdefault(".".join(map(str, parts)), (key, text))
        if before[0].rpartition(".")[2] != key.rpartition(".")[2]:
            path = ".".join(map(str, parts))
            raise ConfigError(
                f"--{key}: {path} is given twice, as --{before[0]} {before[1]} and --{key} {text}; keep one"
            )
        _put(tree, origins, parts, _value(key, text, kind), f"--{key}")


def resolve(key: str) -> tuple[list[str | int], Any]:
    """A key of the command line -> (its full path, its type). A key may leave out the sections it stands in.

    In a path an int is the index of a list.

    Raises:
        ConfigError: no such key (names the nearest), or several (names them).
    """
    found = _walk(Config, key.split("."))
    if found is not None:
        return found
    candidates = []
    for prefix in _sections(Config):
        found = _walk(Config, [*prefix, *key.split(".")])
        if found is not None:
            candidates.append(found)
    if not candidates:
        raise ConfigError(f"--{key}: unknown key; {nearest(key, known_paths())}")
    if len(candidates) > 1:
        paths = ", ".join("--" + ".".join(map(str, parts)) for parts, _ in candidates)
        raise ConfigError(f"--{key}: ambiguous; write one of {paths}")
    return candidates[0]


def _sections(cls: type, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, kind in hints(cls).items():
        inner = section(kind)
        if inner is not None:
            found += [(*prefix, name), *_sections(inner, (*prefix, name))]
    return found


def _walk(kind: Any, parts: list[str]) -> tuple[list[str | int], Any] | None:
    """(path, type) of what ``parts`` lead to below a type; None when they lead nowhere."""
    if not parts:
        return [], kind
    inner, item = section(kind), item_type(kind)
    head, tail = parts[0], parts[1:]
    if inner is not None:
        name = key_name(inner, head)
        step = hints(inner).get(name)
        below = None if step is None else _walk(step, tail)
        return None if below is None else ([name, *below[0]], below[1])
    if item is not None and head.isdigit():
        below = _walk(item, tail)
        return None if below is None else ([int(head), *below[0]], below[1])
    for member in members(kind):
        if member is dict:
            return list(parts), Any
        if typing.get_origin(member) is dict:
            return [".".join(parts)], typing.get_args(member)[1]  # a task's name may hold dots
    return None


def _value(key: str, text: str, kind: Any) -> Any:
    origins: Origins = {}
    try:
        value = parse(text, f"--{key}", origins)
    except ConfigError:
        if str in members(kind):
            return text  # a regular expression, say
        raise
    if str in members(kind) and not isinstance(value, list | dict | None):
        return text  # a run may be called 007
    return value


def _put(tree: dict[str, Any], origins: Origins, parts: list[str | int], value: Any, origin: str) -> None:
    here: Any = tree
    path = ""
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        wanted, kind = (list, "a list") if isinstance(part, int) else (dict, "a section")
        fits = isinstance(here, wanted)
        if not fits:
            raise ConfigError(f"{located(origins.get(path, origin), path)}: expected {kind}, found {here!r}")
        path = join(path, str(part))
        # A run that names no phases has one, so that --phases.1 is a second.
        fresh: Any = [{}] if path == "phases" else [] if isinstance(following, int) else {}
        if isinstance(part, int) and part > len(here):
            raise ConfigError(f"{origin}: index {part}, but the list has {len(here)} items")
        if isinstance(part, int) and part == len(here):
            here.append(fresh)
        if following is None:
            here[part] = value
        elif here[part] is None if isinstance(part, int) else here.get(part) is None:
            here[part] = fresh
        here = here[part]
    for old in [p for p in origins if p.startswith(path + ".")]:
        del origins[old]
    origins.update(dict.fromkeys(_paths(value, path), origin))


def _paths(value: Any, path: str) -> Iterator[str]:
    """The path of a value and of all that it holds: ``--mixing '{cap: 3}'`` sets ``mixing.cap``."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _paths(item, join(path, str(key)))
