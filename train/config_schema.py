"""All settings as a JSON schema. What a key means is the comment behind its field in the source."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from typing import Any

from taskmoe.moe import config as moe_config
from taskmoe.moe.config import ALIASES
from taskmoe.train import config as train_config
from taskmoe.train.config import Config
from taskmoe.train.config_checks import RANGES, choices
from taskmoe.train.config_choices import describe_choices
from taskmoe.train.config_comments import field_comments
from taskmoe.train.config_decode import hints, members, nullable, section
from taskmoe.train.config_yaml import join

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


def schema() -> dict[str, Any]:
    """A JSON schema of the YAML: type, default, choices, range and description of every key."""
    comments = {**field_comments(moe_config), **field_comments(train_config)}
    built = _section(Config, "", comments)
    built["properties"]["moe"] = describe_choices(built["properties"]["moe"])
    extends = {"type": "string", "description": "another YAML, relative to this one, that this one changes"}
    built["properties"] = {"extends": extends, **built["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "taskmoe", **built}


def _section(cls: type, path: str, comments: dict[tuple[str, str], str]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        kind, here = hints(cls)[f.name], join(path, f.name)
        entry = _type(kind, here, comments)
        comment = comments.get((cls.__name__, f.name))
        if comment:
            entry["description"] = comment
        if f.default is not dataclasses.MISSING:
            entry["default"] = _plain(f.default)
        properties[f.name] = entry
        for alias, name in ALIASES.items():
            if cls is moe_config.TaskMoEConfig and name == f.name:
                properties[alias] = {**entry, "description": f"another name of {name}"}
    doc = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return {"type": "object", "description": doc, "properties": properties, "additionalProperties": False}


def _type(kind: Any, path: str, comments: dict[tuple[str, str], str]) -> dict[str, Any]:
    inner = section(kind)
    if inner is not None:
        entry = _section(inner, path, comments)
        return {**entry, "type": ["object", "null"]} if nullable(kind) else entry
    options = [_member(m, path, comments) for m in members(kind)]
    entry = options[0] if len(options) == 1 else {"anyOf": options}
    allowed, bounds = choices(path), RANGES.get(path)
    for target in (entry["items"],) if entry.get("type") == "array" else (entry,):
        if allowed is not None:
            off = [None] if nullable(kind) and target is entry else []
            target["enum"] = [*allowed, *off]
        if bounds is not None:
            target.update(_bounds(bounds))
    if nullable(kind):
        if "anyOf" in entry:
            entry["anyOf"].append({"type": "null"})
        else:
            entry["type"] = [entry["type"], "null"]
    return entry


def _member(kind: Any, path: str, comments: dict[tuple[str, str], str]) -> dict[str, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        entry = {"type": "array", "items": _type(args[0], path + ".*", comments)}
        return entry if args[-1] is Ellipsis else {**entry, "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1], path + ".*", comments)}
    return {"type": _PLAIN[kind]}


def _bounds(bounds: tuple[float, float, str]) -> dict[str, Any]:
    low, high, words = bounds
    lowest = {"exclusiveMinimum": 0} if words.endswith("> 0") else {"minimum": low}
    if math.isinf(high):
        return lowest
    return {**lowest, **({"exclusiveMaximum": 1} if words.endswith("< 1") else {"maximum": high})}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
