"""Which modules get a bank, by PEFT's conventions for ``target_modules``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.heads import TaskLinear

LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def features(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a module that maps [..., d_in] to [..., d_out] by a weight, else None."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int) and hasattr(module, "weight"):
        return d_in, d_out
    return None


def _matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """PEFT's rule: a string is a regex on the whole name, a list holds name suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == p or name.endswith("." + p) for p in pattern)


def layer_number(name: str) -> int | None:
    """The first number in a dotted name: 3 of ``model.layers.3.mlp.up_proj``."""
    found = LAYER_NUMBER.search(name)
    return int(found.group(1)) if found else None


def find_targets(model: nn.Module, config: TaskMoEConfig, saved: Sequence[str] = ()) -> dict[str, nn.Module]:
    """{name: module} of the linears that ``config`` selects, in the order of the model.

    "all-linear" is every linear except the output embeddings and the classification head. Modules named in
    ``saved`` (trained whole) and what is inside them are left out.

    Raises:
        ConfigError: nothing matches, or a name in a list matches nothing; lists the closest names.
    """
    candidates = {n: m for n, m in model.named_modules() if features(m) is not None}
    for key in ("target_modules", "exclude_modules"):
        _check_patterns(key, getattr(config, key), candidates)
    pattern = config.target_modules
    if isinstance(pattern, str) and pattern.lower() == "all-linear":
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {n: m for n, m in candidates.items() if m is not outputs}
        if type(model).__name__.endswith("ForSequenceClassification"):
            inner = {id(m) for m in model.base_model.modules()}  # type: ignore[union-attr]
            chosen = {n: m for n, m in chosen.items() if id(m) in inner}
    else:
        chosen = {n: m for n, m in candidates.items() if _matches(n, pattern)}
    if not chosen:
        raise ConfigError(_no_match("target_modules", pattern, candidates))
    chosen = {n: m for n, m in chosen.items() if not any(n == s or n.startswith(s + ".") for s in saved)}
    if not chosen:
        raise ConfigError("moe.modules_to_save leaves no target; save less or target more")
    if config.exclude_modules is not None:
        chosen = {n: m for n, m in chosen.items() if not _matches(n, config.exclude_modules)}
    if not chosen:
        raise ConfigError("moe.exclude_modules leaves no target; exclude less")
    if config.layers_to_transform is not None:
        wanted_layers = config.layers_to_transform
        numbers = {wanted_layers} if isinstance(wanted_layers, int) else set(wanted_layers)
        missing = numbers - {layer_number(n) for n in chosen}
        if missing:
            raise ConfigError(
                f"moe.layers_to_transform: no target in layers {sorted(missing)}; pick layers that exist"
            )
        chosen = {n: m for n, m in chosen.items() if layer_number(n) in numbers}
    return chosen


def saved_modules(model: nn.Module, config: TaskMoEConfig) -> list[str]:
    """Names of the modules that ``modules_to_save`` selects, which train whole.

    Raises:
        ConfigError: a name that matches nothing, lies inside another one, or is a head per task.
    """
    if isinstance(config.modules_to_save, str):
        raise ConfigError(
            f"moe.modules_to_save: {config.modules_to_save!r} is one string; give a list of names"
        )
    found: list[str] = []
    for wanted in config.modules_to_save or ():
        names = [n for n, _ in model.named_modules() if n == wanted or n.endswith("." + wanted)]
        if not names:
            leaves = ", ".join(sorted({n.rpartition(".")[2] for n, _ in model.named_modules() if n})[:20])
            raise ConfigError(f"moe.modules_to_save: {wanted!r} matches no module; names are {leaves}")
        found += [n for n in names if n not in found]
    for name in found:
        outer = [n for n in found if name.startswith(n + ".")]
        if outer:
            raise ConfigError(
                f"moe.modules_to_save: {name} lies inside {outer[0]}, which is saved whole; name one of them"
            )
        if any(isinstance(m, TaskLinear) for m in model.get_submodule(name).modules()):
            raise ConfigError(
                f"moe.modules_to_save: {name} is a head per task, which trains anyway; leave it out"
            )
    return found


def _check_patterns(
    key: str, pattern: str | tuple[str, ...] | None, candidates: dict[str, nn.Module]
) -> None:
    """A regex must compile and match a linear, and so must every name of a list."""
    if pattern is None or (isinstance(pattern, str) and pattern.lower() == "all-linear"):
        return
    for wanted in (pattern,) if isinstance(pattern, str) else [(name,) for name in pattern]:
        try:
            found = any(_matches(n, wanted) for n in candidates)
        except re.error as error:
            raise ConfigError(f"moe.{key}: {wanted!r} is not a regular expression ({error})") from error
        if not found:
            raise ConfigError(_no_match(key, wanted if isinstance(wanted, str) else wanted[0], candidates))


def _no_match(key: str, pattern: object, candidates: dict[str, nn.Module]) -> str:
    leaves = sorted({n.rpartition(".")[2] for n in candidates} - {""})
    wanted = pattern if isinstance(pattern, str) else str(pattern)
    near = difflib.get_close_matches(wanted, [*leaves, *candidates], n=4, cutoff=0.4) or leaves[:8]
    return f"moe.{key}: {pattern!r} matches no linear layer; the closest names are {', '.join(near)}"


def rank_of(name: str, config: TaskMoEConfig) -> int:
    """The rank of one expert of a target: ``rank_pattern`` (name suffix or regex, as in PEFT), else ``r``."""
    return _matched(name, config.rank_pattern, config.r)


def experts_of(name: str, config: TaskMoEConfig) -> int:
    """The number of experts of a target: ``expert_pattern``, else ``num_experts``."""
    return _matched(name, config.expert_pattern, config.num_experts)


def _matched(name: str, patterns: dict[str, int] | None, otherwise: int) -> int:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def check_patterns(names: list[str], config: TaskMoEConfig) -> None:
    """Raises:
    ConfigError: a key of ``rank_pattern`` or ``expert_pattern`` that matches no target.
    """
    patterns = {"rank_pattern": config.rank_pattern, "expert_pattern": config.expert_pattern}
    for key, pattern in ((key, p) for key, given in patterns.items() for p in given or {}):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"moe.{key}: {pattern!r} is not a regular expression ({error})") from error
        if not any(re.match(rf"(.*\.)?({pattern})$", n) for n in names):
            raise ConfigError(
                f"moe.{key}: {pattern!r} matches no target; targets are {', '.join(names[:8])} ..."
            )


def routing_group(name: str, scope: str) -> str:
    """The name of the group of layers that a target shares its routing with."""
    if scope == "linear":
        return name
    if scope == "model":
        return "model"
    found = LAYER_NUMBER.search(name)
    if found is None:
        return name.rpartition(".")[0] or name
    end = found.end(1) if scope == "layer" else found.start(1)
    return name[:end].rstrip(".") or "stack"
