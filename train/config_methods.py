"""Checks of methods that are chosen by name, by building them: that imports torch, so only where one is."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_decode import Decoder
from taskmoe.train.config_idle import unshared_scopes


def check_moe_names(config: Config, check: Decoder) -> None:
    """``moe``: the names on its seams and their options, which all other checks build on."""
    from taskmoe.moe.choices import SEAMS, check_choices

    for seam, allowed in SEAMS.items():
        value = getattr(config.moe, seam)
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
            message = f"{value!r} is not one of {', '.join(allowed)}; the nearest is {near!r}"
            raise check.fail(f"moe.{seam}", message)
    _located(check, check_choices, config.moe)


def check_moe(config: Config, check: Decoder) -> None:
    """``moe``: what the choices on its seams exclude, also with the gates of phases and packed rows."""
    from taskmoe.moe.attach import check as check_settings
    from taskmoe.moe.choices import refuses_packs
    from taskmoe.moe.gates import with_gate

    _located(check, check_settings, config.moe)
    if config.data.packing and (refused := refuses_packs(config.moe)) is not None:
        raise check.fail("data.packing", f"{refused}; set data.packing: false")
    for i, phase in enumerate(config.phases):
        try:
            if phase.gate is not None:
                check_settings(with_gate(config.moe, phase.gate))
        except ConfigError as error:
            key, _, message = str(error).partition(": ")
            raise check.fail(f"phases.{i}.gate", message if key == "moe.gate" else str(error)) from error


def _located(check: Decoder, call: Callable[..., Any], *args: Any) -> None:
    """``call``, with errors that name the place where their key was written."""
    try:
        call(*args)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        raise check.fail(key, message) from error


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
    _located(check, Balancer, balancing.method, n_tasks, options)


def check_surgery(config: Config, check: Decoder) -> None:
    """``surgery``: the method and its options, and what they exclude."""
    surgery = config.surgery
    if surgery.method is None:
        return
    from taskmoe.moe.regularisers.kinds import check_alone, read_regularisers
    from taskmoe.train.surgery.choose import choose
    from taskmoe.train.surgery.direct import DIRECT

    others = {g for phase in config.phases for g in phase.train} & {"base", "saved"}
    if config.moe.modules_to_save is None:
        others.discard("saved")
    apart = bool(others) and surgery.scope in ("all", "layer")
    if surgery.way == "fused" and apart:
        message = f"'fused' splits experts and routers, and {sorted(others)[0]} trains too; set way to auto"
        raise check.fail("surgery.way", f"{message}, or surgery.scope to experts")
    _located(check, choose, surgery.method, surgery.options)
    way = ("separate" if apart else "fused") if surgery.way == "auto" else surgery.way
    terms = {name: term for name, (_, term) in read_regularisers(config.moe).items()}
    _located(check, check_alone, terms, way)
    nothing = unshared_scopes(config).get(surgery.scope)
    if nothing is not None:
        raise check.fail("surgery.scope", nothing)
    if surgery.method in DIRECT and surgery.refresh_every > 1:
        message = f"{surgery.refresh_every}, but {surgery.method!r} has no weights to use again; set it to 1"
        raise check.fail("surgery.refresh_every", message)
    if surgery.method in DIRECT and surgery.scope == "layer":
        raise check.fail("surgery.scope", f"'layer' has no effect on {surgery.method!r}; set it to all")
