"""What to attach: one frozen dataclass, with PEFT's names where PEFT has one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

# Names used by other libraries for the same thing (peft's PolyConfig).
ALIASES = {"n_skills": "num_experts", "n_splits": "num_heads"}

SCOPES = ("linear", "layer", "stack", "model")
COMPOSE = ("after", "before")
NEW_ROWS = ("mean", "zero", "random", "nearest")


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the key, the value found and what to do."""


@dataclass(frozen=True)
class TaskMoEConfig:
    """Settings of one mixture of experts: a method of ``docs/METHODS.md`` is a choice on each of five seams.

    The seams: ``representation``, ``router``, ``gate``, ``bank`` and ``regularisers``. Each choice names the
    keys that it reads (``uses``); what is its own stands in the seam's ``*_options``. With the default bank
    the attached layer computes ``y = W0 x + (lora_alpha / r) * sum_e g_e(task) * B_e A_e x``.
    """

    r: int = 4  # rank of one expert; rank-1 experts are r = 1
    num_experts: int = 8  # beside each linear, or copies of each module
    lora_alpha: float | None = None  # None: r, so that the scale is 1
    lora_dropout: float = 0.0  # of the rows that experts read
    bank: str = "low_rank"  # what the experts are
    bank_options: dict | None = None  # of the bank, for example {of: ffn}
    compose: str = "after"  # after: gate the experts' outputs; before: average their parameters (Poly)
    num_heads: int = 1  # > 1: one routing row per block of the features (MHR); needs compose: before
    representation: str = "learned"  # what a router that takes one knows of a task
    representation_options: dict | None = None  # of the representation, for example {path: vectors.json}
    router: str = "task_table"  # what turns a task, or a token, into logits over experts
    router_options: dict | None = None  # of the router, for example {cell: gru}
    router_scope: str = "linear"  # linear | layer | stack | model: which layers share one routing
    router_init_std: float = 1e-3  # of logits at the start; 1.0: tasks start apart
    task_embedding_dim: int = 64  # representation: learned
    router_hidden_dim: int = 64  # routers with a hidden layer
    gate: str = "softmax"  # what turns logits into how much of each expert
    gate_options: dict | None = None  # of the gate, for example {normalise: l2}
    top_k: int | None = None  # gate: top_k
    router_temperature: float = 1.0  # what logits are divided by
    regularisers: dict | None = None  # {name: weight, or its options, for example {z_loss: 0.001}}
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    rank_pattern: dict[str, int] | None = None  # {module name or regex: r}
    expert_pattern: dict[str, int] | None = None  # {module name or regex: num_experts}; token routers only
    modules_to_save: tuple[str, ...] | None = None
    new_task_rows: str = "mean"  # rows of tasks added later: mean | zero | random | nearest (in a run)

    def ranks(self) -> tuple[int, ...]:
        """Each rank that some layer may have: ``r`` and those of ``rank_pattern``."""
        return (self.r, *(self.rank_pattern or {}).values())

    def expert_counts(self) -> tuple[int, ...]:
        """Each number of experts that some layer may have: ``num_experts``, and ``expert_pattern``'s."""
        return (self.num_experts, *(self.expert_pattern or {}).values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskMoEConfig:
        """The inverse of :meth:`to_dict`; aliases are accepted, lists become tuples.

        Raises:
            ConfigError: a key that is not a setting, or a setting given twice (by its name and by an alias).
        """
        known = {f.name for f in fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, key)
            if name not in known:
                raise ConfigError(f"moe.{key}: unknown setting; known are {', '.join(sorted(known))}")
            if name in clean:
                raise ConfigError(f"moe.{key}: {name} is given twice, as {clean[name]} and {value}; keep one")
            clean[name] = tuple(value) if isinstance(value, list) else value
        return cls(**clean)
