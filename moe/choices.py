"""What the chosen methods read of the settings, and whether they go together.

A seam's choice is in use when another choice needs it; a key is ignored when no choice in use reads it.
Besides ``uses`` a choice may have ``mutes`` (keys of the others that it leaves without effect),
``idle(options)`` ({key or option of its own: why it has no effect with these options}) and
``check(config, options)``, which raises ConfigError for settings that cannot work whatever the model is.
Three more are truths, or functions of its options, and true if it does not say: ``trains`` (it has parameters
that do), ``shares`` (tasks share them), ``packs`` (it takes rows of several sequences). A bank that
``routes`` has parameters of the group router. ``taskmoe config`` and ``attach`` ask for all of it, so that a
method brings its checks in its own file.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.gates import GATES
from taskmoe.moe.options import GENERAL, default_options, idle, options_of
from taskmoe.moe.representations.kinds import REPRESENTATIONS
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS

SEAMS: dict[str, dict[str, Any]] = {
    "bank": BANKS,
    "router": {**ROUTERS, **TOKEN_ROUTERS},
    "representation": REPRESENTATIONS,
    "gate": GATES,
}
# Groups of parameters, and the seam whose choice has them.
GROUPS = {"experts": "bank", "router": "router", "task_embedding": "representation"}


def choices_in_use(config: TaskMoEConfig) -> dict[str, Any]:
    """{seam: the chosen method} of the seams that have a part in it.

    A bank that takes no gates has neither router nor gate; a router that takes no vectors no representation.
    """
    chosen = {"bank": BANKS[config.bank]}
    if chosen["bank"].levels:
        chosen["router"] = SEAMS["router"][config.router]
        chosen["gate"] = GATES[config.gate]
        if "representation" in chosen["router"].uses:
            chosen["representation"] = REPRESENTATIONS[config.representation]
    elif "representation" in chosen["bank"].uses:
        chosen["representation"] = REPRESENTATIONS[config.representation]
    return chosen


def keys_read(config: TaskMoEConfig) -> set[str]:
    """The flat keys that the choices in use read with the options that they have.

    Raises:
        ConfigError: options that cannot be used.
    """
    read: set[str] = set()
    for seam, method in choices_in_use(config).items():
        read |= set(method.uses) - idle(method, options_of(seam, config, method)).keys()
    for method in choices_in_use(config).values():
        read -= set(getattr(method, "mutes", ()))  # keys of the others that it leaves without effect
    return read


def ignored(config: TaskMoEConfig) -> dict[str, str]:
    """{key: why it has no effect} of the keys that no choice in use reads."""
    chosen = choices_in_use(config)
    used = keys_read(config)
    used |= {f"{seam}_options" for seam, method in chosen.items() if default_options(method)}
    found = {}
    for field in dataclasses.fields(config):
        if field.name not in used and field.name not in (*GENERAL, *chosen):
            found[field.name] = _reason(field.name, config)
    for seam in SEAMS.keys() - chosen.keys():
        found[seam] = _not_in_use(config)
    return found


def _reason(key: str, config: TaskMoEConfig) -> str:
    readers = [f"{seam} {name}" for seam, name in readers_of(key)]
    chosen = ", ".join(f"moe.{seam} is {_with_options(config, seam)}" for seam in SEAMS)
    return f"{chosen}; it belongs to {', '.join(readers) or 'none of the choices'}"


def _with_options(config: TaskMoEConfig, seam: str) -> str:
    options = getattr(config, f"{seam}_options")
    return f"{getattr(config, seam)!r}" + (f" with {options}" if options else "")


def absent_groups(config: TaskMoEConfig) -> dict[str, str]:
    """{group of parameters: why none of it trains} out of experts, router and task_embedding."""
    chosen, found = choices_in_use(config), {}
    for group, seam in GROUPS.items():
        if seam not in chosen:
            found[group] = _not_in_use(config)
        elif not _says("trains", seam, config):
            # A map of all tasks would only fill the line, where it is not the reason.
            depends = callable(getattr(chosen[seam], "trains", True))
            who = _with_options(config, seam) if depends else repr(getattr(config, seam))
            found[group] = f"moe.{seam} is {who}, which does not train"
    if getattr(chosen["bank"], "routes", False):
        found.pop("router", None)
    return found


def shared_groups(config: TaskMoEConfig) -> set[str]:
    """The groups of parameters, out of experts and router, that tasks share."""
    chosen = choices_in_use(config)
    return {g for g in ("experts", "router") if GROUPS[g] in chosen and _says("shares", GROUPS[g], config)}


def _says(what: str, seam: str, config: TaskMoEConfig) -> bool:
    """What a choice says of itself: a truth, or a function of its options; default: yes."""
    method = choices_in_use(config)[seam]
    said = getattr(method, what, True)
    return bool(said(options_of(seam, config, method)) if callable(said) else said)


def _not_in_use(config: TaskMoEConfig) -> str:
    return f"moe.bank {config.bank!r} and moe.router {config.router!r} take none"


def readers_of(key: str) -> list[tuple[str, str]]:
    """(seam, name) of every choice that reads a key."""
    found = []
    for seam, methods in SEAMS.items():
        for name, method in methods.items():
            if key in method.uses or (key == f"{seam}_options" and default_options(method)):
                found.append((seam, name))
    return found


def check_choices(config: TaskMoEConfig) -> None:
    """Refuse names that are unknown, options that are, and gates that the bank does not take.

    Raises:
        ConfigError: names the key, the value and what to do.
    """
    for seam, methods in SEAMS.items():
        value = getattr(config, seam)
        if value not in methods:
            near = difflib.get_close_matches(str(value), methods, n=1, cutoff=0.0)[0]
            known = ", ".join(methods)
            raise ConfigError(f"moe.{seam}: {value!r} is unknown; known are {known}; the nearest is {near!r}")
    chosen = choices_in_use(config)
    for seam, method in chosen.items():
        options_of(seam, config, method)
    for seam in SEAMS.keys() - chosen.keys():
        if getattr(config, f"{seam}_options"):
            raise ConfigError(f"moe.{seam}_options: no {seam} is in use here; leave them out")
    if "router" in chosen:
        level = "token" if config.router in TOKEN_ROUTERS else "task"
        if level not in chosen["bank"].levels:
            wanted = " and ".join(chosen["bank"].levels)
            raise ConfigError(
                f"moe.router: {config.router!r} routes by {level}, but moe.bank {config.bank!r} takes gates "
                f"by {wanted}"
            )


def check_methods(config: TaskMoEConfig) -> None:
    """Refuse what the choices in use say of the settings themselves: each in ``check(config, options)``.

    Names, options and counts are checked before.

    Raises:
        ConfigError: names the key, the value and what to do.
    """
    for seam, method in choices_in_use(config).items():
        if hasattr(method, "check"):
            method.check(config, options_of(seam, config, method))


def refuses_packs(config: TaskMoEConfig) -> str | None:
    """Which choice in use takes no rows of several sequences; None: each takes them."""
    for seam in choices_in_use(config):
        if not _says("packs", seam, config):
            return f"moe.{seam} {getattr(config, seam)!r} takes no rows of several sequences"
    return None
