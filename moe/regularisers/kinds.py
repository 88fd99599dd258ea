"""Regularisers by name, and how ``moe.regularisers`` chooses among them."""

from __future__ import annotations

import difflib

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
            raise ConfigError(
                f"{key}: unknown; known are {', '.join(REGULARISERS)}; the nearest is {near!r}"
            )
        weight, options = read_weight(name, given, kind.signed)
        filled = read_options(key, f"regulariser {name!r}", kind, options)
        found[name] = weight, kind(filled, config, TaskTable() if tasks is None else tasks)
    return found


def check_alone(config: TaskMoEConfig) -> None:
    """Refuse terms that couple tasks inside the layers, where the tasks' gradients are to be kept apart.

    Raises:
        ConfigError: names the term.
    """
    for name, (_, term) in read_regularisers(config).items():
        if term.sort == "activations" and term.couples:
            raise ConfigError(refusal(name))


def refusal(name: str) -> str:
    """Why a term that couples tasks does not go with surgery."""
    return (
        f"moe.regularisers.{name}: couples the rows of several tasks inside the layers, so it belongs to no "
        "task's gradient; leave it out, or surgery.method"
    )
