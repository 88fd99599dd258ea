"""Regularisers by name, and how ``moe.regularisers`` chooses among them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import read_options
from taskmoe.moe.regularisers.alignment import Alignment
from taskmoe.moe.regularisers.base import Regulariser, read_weight
from taskmoe.moe.regularisers.distillation import Distillation
from taskmoe.moe.regularisers.expert_terms import ExpertDistance, Orthogonality
from taskmoe.moe.regularisers.fusion_identity import FusionIdentity
from taskmoe.moe.regularisers.routing_terms import Entropy, Sparsity, ZLoss
from taskmoe.moe.regularisers.token_terms import LocalisedBalance, TokenBalance, TokenCV, TokenZLoss
from taskmoe.moe.regularisers.window_balance import WindowBalance
from taskmoe.moe.tasks import TaskTable

REGULARISERS: dict[str, type[Regulariser]] = {
    "window_balance": WindowBalance,
    "z_loss": ZLoss,
    "entropy": Entropy,
    "sparsity": Sparsity,
    "orthogonality": Orthogonality,
    "expert_distance": ExpertDistance,
    "fusion_identity": FusionIdentity,
    "token_balance": TokenBalance,
    "token_z_loss": TokenZLoss,
    "token_cv": TokenCV,
    "localised_balance": LocalisedBalance,
    "alignment": Alignment,
    "distillation": Distillation,
}


def read_regularisers(
    config: TaskMoEConfig, tasks: TaskTable | None = None
) -> dict[str, tuple[float, Regulariser]]:
    """{name: (weight, term)} of ``moe.regularisers``.

    Args:
        tasks: None: names of tasks in options are not looked up.

    Raises:
        ConfigError: an unknown name or option, a weight that is none, or a term of something that the other
            choices do not have; with its key.
    """
    found: dict[str, tuple[float, Regulariser]] = {}
    for name, given in (config.regularisers or {}).items():
        key = f"moe.regularisers.{name}"
        kind = REGULARISERS.get(name)
        if kind is None:
            near = difflib.get_close_matches(str(name), REGULARISERS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}: unknown; known are {', '.join(REGULARISERS)}; the nearest is {near!r}")
        weight, options = read_weight(name, given, kind.signed)
        filled = read_options(key, f"regulariser {name!r}", kind, options)
        if not kind.fits(filled, config):
            raise ConfigError(no_place(name))
        found[name] = weight, kind(filled, config, TaskTable() if tasks is None else tasks)
    return found


def check_alone(terms: Mapping[str, Regulariser], way: str) -> None:
    """Refuse what has no place in a matrix of task gradients.

    Args:
        terms: by name. way: of surgery, ``fused``, ``separate`` or ``slices``.

    Raises:
        ConfigError: names the term.
    """
    for name, term in terms.items():
        if term.sort != "activations":
            continue
        if term.couples:
            raise ConfigError(
                f"moe.regularisers.{name}: couples the rows of several tasks inside the layers, so it "
                "belongs to no task's gradient; leave it out, or surgery.method"
            )
        if way != "fused":
            raise ConfigError(
                f"moe.regularisers.{name}: would join the loss once in each pass of surgery.way {way!r}; it "
                "needs the one pass of 'fused'"
            )


def no_place(name: str) -> str:
    """That a model has no place for a term."""
    return f"moe.regularisers.{name}: {REGULARISERS[name].absent}; leave it out"
