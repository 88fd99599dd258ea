"""The keys of a run's numbers, tables and images: docs/TRACKING.md says what each one means.

A key is made of parts between slashes. In a pattern ``<task>`` stands for a task's slug, ``<group>`` for a
routing group (a layer, where tokens are routed), any other ``<name>`` for one of a few names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

AXIS = "step"  # optimiser steps done


@dataclass(frozen=True)
class Key:
    """What is kept under keys of one pattern.

    kind: ``curve``: a number a step; ``log``: in the log file alone; ``table``, ``image``, ``chart``: what
    wandb shows. summary: what wandb's summary of a run holds of a curve; None: its last value.
    """

    kind: str = "curve"
    summary: str | None = None


class Curves:
    """Which keys a run draws as curves in wandb: at most ``max_keys``, first come, first served.

    Numbers of the whole run always find room: :data:`RESERVED` places are theirs. Keys of routing groups are
    drawn with ``detail: detailed`` alone.

    Args:
        say: prints one line, once, when keys begin to be left out for want of room.
    """

    def __init__(self, detail: str, max_keys: int, say: Callable[[str], None]) -> None:
        self.detail, self.max_keys, self._say = detail, max_keys, say
        self._drawn: dict[str, bool] = {}  # every key that was asked for so far
        self._number = 0  # of those that are drawn
        self._told = False

    def select(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values that are drawn."""
        full = []
        for key in [key for key in values if key not in self._drawn]:
            wanted, room = self._is_wanted(key), self._number < self._limit(key)
            self._drawn[key] = wanted and room
            self._number += self._drawn[key]
            if wanted and not room:
                full.append(key)
        if full and not self._told:
            self._told = True
            self._say(
                f"wandb: track.max_keys: {self.max_keys} curves have no room for {len(full)} keys, the first "
                f"of them {full[0]}; trainer_log.jsonl has them all"
            )
        return {key: value for key, value in values.items() if self._drawn[key]}

    def _is_wanted(self, key: str) -> bool:
        pattern = pattern_of(key)
        if pattern is None:
            return True
        return KEYS[pattern].kind == "curve" and not (self.detail == "brief" and "<group>" in pattern)

    def _limit(self, key: str) -> int:
        """How many curves there may be with this one."""
        pattern = pattern_of(key) or ""
        whole = "<task>" not in pattern and "<group>" not in pattern
        return self.max_keys if whole else max(0, self.max_keys - RESERVED)


RESERVED = 64  # curves: a run has a few dozen that belong neither to a task nor to a routing group

KEYS: dict[str, Key] = {
    "train/loss": Key(summary="min,last"),
    "train/loss/<task>": Key(),
    "train/tokens/<task>": Key(),
    "train/epochs/<task>": Key(),
    "train/weight/<task>": Key(),
    "train/grad_norm": Key(),
    "train/tokens_per_second": Key(),
    "train/tracking_seconds": Key(),
    "weight/<task>": Key(),
    "learning_rate/<parameters>": Key(),
    "regulariser/<term>": Key(),
    "grad/conflict_frac": Key(),
    "grad/cosine": Key(),
    "grad/same_task_cosine": Key(),
    "grad/update_change": Key(),
    "grad/rows": Key("log"),
    "grad/cosine_matrix": Key("log"),
    "grad/conflict": Key("image"),
    "grad/conflict_table": Key("table"),
    "eval/score": Key(summary="max,last"),
    "eval/macro/loss": Key(summary="min,last"),
    "eval/macro/<metric>": Key(),
    "eval/<task>/<metric>": Key(),
    "eval/<task>/rows": Key("log"),
    "eval/<task>/metric": Key("log"),
    "eval/table": Key("table"),
    "eval/by_task": Key("chart"),
    "routing/entropy": Key(),
    "routing/effective_experts": Key(),
    "routing/dead_expert_frac": Key(),
    "routing/over_uniform": Key(),
    "routing/between_tasks": Key(),
    "routing/drift": Key(),
    "routing/<group>/<number>": Key(),
    "routing/<group>/<head>/<number>": Key(),
    "routing/<group>/heat": Key("image"),
    "routing/gates": Key("table"),
    "routing/depth": Key("chart"),
    "routing/similarity": Key("image"),
    "routing/similarity_table": Key("table"),
}
FAMILIES = tuple(dict.fromkeys(pattern.partition("/")[0] for pattern in KEYS))


def _expression(pattern: str) -> re.Pattern[str]:
    literal = re.escape(pattern).replace("<metric>", ".+")  # of a label, which is any text: f1:yes/no
    return re.compile(re.sub(r"<\w+>", "[^/]+", literal))


# The most literal one first.
_EXPRESSIONS = {pattern: _expression(pattern) for pattern in sorted(KEYS, key=lambda p: p.count("<"))}


@cache
def pattern_of(key: str) -> str | None:
    """The pattern that a key belongs to; None for a key that nobody has described.

    >>> pattern_of("eval/macro/f1"), pattern_of("eval/sum/f1"), pattern_of("surprise")
    ('eval/macro/<metric>', 'eval/<task>/<metric>', None)
    """
    return next((p for p, expression in _EXPRESSIONS.items() if expression.fullmatch(key)), None)
