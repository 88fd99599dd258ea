"""Checks of methods that are chosen by name, by building them: that imports torch, so only where one is."""

from __future__ import annotations

import difflib

from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_decode import Decoder


def check_moe_names(config: Config, check: Decoder) -> None:
    """``moe``: the names on its seams, which all other checks build on."""
    from taskmoe.moe.choices import SEAMS

    for seam, allowed in SEAMS.items():
        value = getattr(config.moe, seam)
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
            message = f"{value!r} is not one of {', '.join(allowed)}; the nearest is {near!r}"
            raise check.fail(f"moe.{seam}", message)


def check_moe(config: Config, check: Decoder) -> None:
    """``moe``: options of the choices on its seams, and what they exclude; the same for gates of phases."""
    from taskmoe.moe.attach import check as check_settings
    from taskmoe.moe.gates import with_gate

    try:
        check_settings(config.moe)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        raise check.fail(key, message) from error
    for i, phase in enumerate(config.phases):
        try:
            if phase.gate is not None:
                check_settings(with_gate(config.moe, phase.gate))
        except ConfigError as error:
            key, _, message = str(error).partition(": ")
            raise check.fail(f"phases.{i}.gate", message if key == "moe.gate" else str(error)) from error


def check_balancing(config: Config, check: Decoder) -> None:
    """``balancing``: the method and its options."""
    balancing = config.balancing
    if balancing.method is None:
        return
    from taskmoe.train.balancing.balancer import Balancer

    options = balancing.options or {}
    given = options.get("weights")
    # How many tasks there are is known when the data are; here the weights are only looked at one by one.
    n_tasks = len(given) if isinstance(given, list | tuple) else 1
    try:
        Balancer(balancing.method, n_tasks, options)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        raise check.fail(key, message) from error


def check_surgery(config: Config, check: Decoder) -> None:
    """``surgery``: the method and its options, and what they exclude."""
    surgery = config.surgery
    if surgery.method is None:
        return
    from taskmoe.moe.regularisers.kinds import check_alone
    from taskmoe.train.surgery.choose import choose
    from taskmoe.train.surgery.direct import DIRECT

    others = {g for phase in config.phases for g in phase.train} & {"base", "saved"}
    if config.moe.modules_to_save is None:
        others.discard("saved")
    if surgery.way == "fused" and others and surgery.scope in ("all", "layer"):
        message = f"'fused' splits experts and routers, and {sorted(others)[0]} trains too; set way to auto"
        raise check.fail("surgery.way", f"{message}, or surgery.scope to experts")
    try:
        choose(surgery.method, surgery.options)
        check_alone(config.moe)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        raise check.fail(key, message) from error
    if surgery.method in DIRECT and surgery.refresh_every > 1:
        message = f"{surgery.refresh_every}, but {surgery.method!r} has no weights to use again; set it to 1"
        raise check.fail("surgery.refresh_every", message)
    if surgery.method in DIRECT and surgery.scope == "layer":
        raise check.fail("surgery.scope", f"'layer' has no effect on {surgery.method!r}; set it to all")
