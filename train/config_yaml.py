"""YAML as the settings need it: where each key stands, no duplicates, and YAML 1.2's idea of a number.

PyYAML reads YAML 1.1: ``1e-3`` is a string, ``no`` a boolean and ``1:30`` the number 90. A learning rate must
be a number and a label called "no" must stay a label, so plain scalars are resolved as YAML 1.2 does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from taskmoe.moe.config import ConfigError

# Path of a node -> where it was written: {"data.max_length": "quickstart.yaml:12"}
Origins = dict[str, str]

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Quote also what only YAML 1.1 takes for something else ("no", "1:30"): other programs read our files.
    plain = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _represent_text)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # without those of YAML 1.1
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def read(path: str | Path) -> tuple[dict[str, Any], Origins]:
    """The mapping in a YAML file, and where each of its keys stands.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, is not YAML, has a key twice, or is not a mapping.
            The message begins with the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror})") from error
    origins: Origins = {}
    tree = parse(text, str(path), origins)
    if tree is None:
        return {}, origins
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected a mapping of settings, found {_kind(tree)}")
    return tree, origins


def parse(text: str, source: str, origins: Origins | None = None) -> Any:
    """Plain values from YAML text; ``origins`` is filled with ``source:line`` for every key and item.

    Raises:
        ConfigError: not YAML, or a key twice.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, "", source, {} if origins is None else origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}:{line}: not YAML: {what}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: an alias contains itself, or the nesting is too deep") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(tree: dict[str, Any]) -> str:
    """YAML text that :func:`parse` reads back as the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _build(loader: _Loader, node: yaml.Node, path: str, source: str, origins: Origins) -> Any:
    origins.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, source, origins)
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, child, join(path, str(i)), source, origins) for i, child in enumerate(node.value)
        ]
    try:
        return int(node.value, 0) if node.tag.endswith(":int") else loader.construct_object(node)
    except ValueError as error:  # a tag that the value does not fit: !!int abc
        raise ConfigError(f"{origins[path]}: {path}: {node.value!r} is not of type {node.tag}") from error


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, path: str, source: str, origins: Origins
) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{source}:{line}: a key must be a plain name")
        key = key_node.value  # as written: a task may be called 1 or no
        here = join(path, key)
        if key in built:
            raise ConfigError(f"{source}:{line}: {here}: the key stands here twice; first at {origins[here]}")
        origins[here] = f"{source}:{line}"
        built[key] = _build(loader, value_node, here, source, origins)
    return built


def join(path: str, key: str) -> str:
    """A dotted path."""
    return f"{path}.{key}" if path else key


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else repr(value)
