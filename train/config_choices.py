"""The seams of ``moe`` in the JSON schema: which keys a choice reads, and the options that it has."""

from __future__ import annotations

import sys
import typing
from typing import Any

from taskmoe.moe.choices import SEAMS, readers_of
from taskmoe.moe.config import ALIASES
from taskmoe.moe.options import GENERAL, default_options
from taskmoe.moe.regularisers.kinds import REGULARISERS
from taskmoe.train.config_comments import field_comments

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


def describe_choices(moe: dict[str, Any]) -> dict[str, Any]:
    """The schema of the section ``moe`` with, for each key, the choices that read it (``x-read-by``), and for
    each choice the options that it takes (one ``if``/``then`` a choice; an option of another is refused)."""
    for key, entry in moe["properties"].items():
        if key not in GENERAL and (readers := readers_of(ALIASES.get(key, key))):
            entry["x-read-by"] = [f"{seam}: {name}" for seam, name in readers]
    rules = []
    for seam, methods in SEAMS.items():
        for name, method in methods.items():
            condition: dict[str, Any] = {"properties": {seam: {"const": name}}}
            if name != moe["properties"][seam]["default"]:
                condition["required"] = [seam]
            options = {f"{seam}_options": _options(method, f"{seam} {name}")}
            rules.append({"if": condition, "then": {"properties": options}})
    terms = {name: _term(name, kind) for name, kind in REGULARISERS.items()}
    moe["properties"]["regularisers"].update(properties=terms, additionalProperties=False)
    return {**moe, "allOf": rules}


def _term(name: str, kind: Any) -> dict[str, Any]:
    """A regulariser: its weight, or a mapping of its weight and options."""
    weight: dict[str, Any] = {"type": "number", "description": "what the term is multiplied by"}
    weight.update({} if kind.signed else {"exclusiveMinimum": 0})
    whole = _options(kind, f"regulariser {name}")
    whole["properties"] = {"weight": weight, **whole["properties"]}
    title = (kind.__doc__ or name).split("\n\n")[0].replace("\n    ", " ")
    return {"description": title, "anyOf": [weight, {**whole, "type": "object", "required": ["weight"]}]}


def _options(method: Any, who: str) -> dict[str, Any]:
    known = default_options(method)
    entry: dict[str, Any] = {"type": ["object", "null"], "title": f"options of {who}"}
    if not known:
        return {**entry, "properties": {}, "additionalProperties": False}
    kinds = typing.get_type_hints(method.Options)
    comments: dict[str, str] = {}
    for cls in reversed(method.Options.__mro__[:-1]):  # options may be inherited
        found = field_comments(sys.modules[cls.__module__])
        comments.update({field: text for (owner, field), text in found.items() if owner == cls.__name__})
    properties = {}
    for name, default in known.items():
        listed = list(default) if isinstance(default, tuple) else default
        properties[name] = {**_type(kinds[name]), "default": listed}
        if name in comments:
            properties[name]["description"] = comments[name]
    return {**entry, "properties": properties, "additionalProperties": False}


def _type(kind: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return {"type": "array", "items": _type(args[0])}
    if origin is dict:
        return {"type": "object"}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if args:  # a union
        return {"anyOf": [{"type": "null"} if a is type(None) else _type(a) for a in args]}
    return {"type": _PLAIN[kind]}
