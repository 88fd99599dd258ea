"""Settings from a YAML file and a command line, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taskmoe.moe.config import ALIASES
from taskmoe.train import config_overrides, config_yaml
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_checks import validate
from taskmoe.train.config_decode import Decoder, default_of
from taskmoe.train.config_idle import ineffective
from taskmoe.train.config_yaml import Origins, join

__all__ = ["dump", "load", "validate"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge, decode and validate the settings of a run.

    A file may name another to start from, ``extends: other.yaml`` (relative to itself). Sections are merged,
    lists are replaced, and a key without a value takes back what the other file says. ``overrides`` are the
    tokens of a command line (``["--data.max_length", "256", "--bf16"]``) and come last.

    Raises:
        ConfigError: with the file and line, or the option, and the dotted path of the key at fault.
    """
    tree, origins = _read(Path(path), ())
    config_overrides.apply(tree, origins, overrides)
    config = Decoder(origins).decode(Config, tree, "")
    config = _locate(config, Path(path))
    validate(config, origins)
    return config


def dump(config: Config) -> str:
    """The settings as YAML: all that take effect, and any other that is not at its default.

    ``load`` of the text gives an equal ``Config`` for every valid one.
    """
    idle = ineffective(config)
    return config_yaml.dump(_plain(config, "", idle))


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), siblings, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}")
    tree, origins = config_yaml.read(path)
    _rename_aliases(tree, origins)
    base = tree.pop("extends", None)
    if base is None:
        return tree, origins
    at = origins.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{at}: extends: expected the path of a YAML file, found {base!r}")
    target = path.parent / base
    if target.resolve() in (p.resolve() for p in (*chain, path)):
        raise ConfigError(f"{at}: extends: {base} leads back to this file")
    if not target.is_file():
        raise ConfigError(f"{at}: extends: no file {target}")
    below, below_origins = _read(target, (*chain, path))
    _merge(below, tree, below_origins, origins, "")
    return below, below_origins


def _rename_aliases(tree: dict[str, Any], origins: Origins) -> None:
    """Settings under one name before files are merged: num_experts here takes back n_skills there."""
    moe = tree.get("moe")
    if not isinstance(moe, dict):
        return
    for alias, name in ALIASES.items():
        if alias in moe:
            at = origins[f"moe.{alias}"]
            if name in moe:
                raise ConfigError(f"{at}: moe.{alias}: is another name of moe.{name}; give one of them")
            moe[name] = moe.pop(alias)
            origins[f"moe.{name}"] = origins.pop(f"moe.{alias}")


def _merge(base: dict[str, Any], over: dict[str, Any], below: Origins, above: Origins, path: str) -> None:
    for key, value in over.items():
        here = join(path, key)
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            below[here] = above[here]
            _merge(base[key], value, below, above, here)
            continue
        base[key] = value
        for old in [p for p in below if p == here or p.startswith(here + ".")]:
            del below[old]
        below.update({p: at for p, at in above.items() if p == here or p.startswith(here + ".")})


def _locate(config: Config, path: Path) -> Config:
    """Files may be given from where the program runs or from where the YAML lies: DeepSpeed's, and vectors of
    tasks."""
    options = config.moe.representation_options or {}
    given = {"deepspeed": config.deepspeed, "path": options.get("path")}
    found = {
        key: str(path.parent / name)
        for key, name in given.items()
        if isinstance(name, str) and not Path(name).is_file() and (path.parent / name).is_file()
    }
    if "path" in found:
        vectors = {**options, "path": found["path"]}
        moe = dataclasses.replace(config.moe, representation_options=vectors)
        config = dataclasses.replace(config, moe=moe)
    return dataclasses.replace(config, deepspeed=found.get("deepspeed", config.deepspeed))


def _plain(value: Any, path: str, idle: dict[str, str]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {}
        for f in dataclasses.fields(value):
            here, item = join(path, f.name), getattr(value, f.name)
            if here in idle and item == default_of(f):
                continue
            kept[f.name] = _plain(item, here, idle)
        return kept
    if isinstance(value, list | tuple):
        return [_plain(item, join(path, str(i)), idle) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {str(k): _plain(v, join(path, str(k)), idle) for k, v in value.items()}
    return value
