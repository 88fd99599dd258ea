"""What happens when: learning rates, and the phases of a run. Pure functions of the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from taskmoe.train.config import Config, ConfigError, MixingConfig

# The optimiser's groups. `heads` are classification heads, `saved` are copies of modules_to_save.
GROUPS = ("base", "experts", "router", "task_embedding", "heads", "saved")
REINIT = ("experts", "router", "task_embedding", "heads", "saved")  # those that can start anew
# A router reads logits from parameters that start near zero; at the experts' rate it hardly moves.
ROUTER_FACTOR = 10.0


def linear(step: int, total: int, warmup: int) -> float:
    """Up to 1 over ``warmup`` steps, then down to 0 at ``total``."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, total: int, warmup: int) -> float:
    """Up to 1 over ``warmup`` steps, then down to 0 at ``total`` along half a cosine."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def constant(step: int, total: int, warmup: int) -> float:
    """Up to 1 over ``warmup`` steps, then 1."""
    return step / max(1, warmup) if step < warmup else 1.0


def warmup_steps(config: Config, total: int) -> int:
    """Steps of warm-up out of ``total``: ``warmup_steps``, else ``warmup_ratio`` of them, rounded up."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total)
    return math.ceil(total * config.warmup_ratio)


@dataclass(frozen=True)
class Phase:
    """One phase with every setting filled in; it covers the optimiser steps ``start <= step < end``."""

    index: int
    name: str
    start: int
    end: int
    train: tuple[str, ...]  # groups that train
    adapters: bool
    mixing: MixingConfig
    learning_rates: dict[str, float]  # of every group, at the top of the schedule
    router_temperature: tuple[float, float]  # at start and at end
    temperature_schedule: str
    gate: str | None  # None: that of moe
    reinit: tuple[str, ...]
    schedule_start: int  # the learning-rate schedule this phase is part of: from here
    schedule_end: int  # to here

    @property
    def steps(self) -> int:
        return self.end - self.start

    def temperature(self, step: int) -> float:
        """The routers' temperature at ``step``, from the first step of the phase to the last."""
        last = max(1, self.steps - 1)
        share = min(1.0, max(0.0, (step - self.start) / last))
        return TEMPERATURES[self.temperature_schedule](*self.router_temperature, share)


def resolve_phases(config: Config) -> list[Phase]:
    """The phases of a run, with the run's settings where a phase has none of its own.

    A phase without ``steps`` takes what the others leave of ``max_steps``.

    Raises:
        ConfigError: no phase, two phases without steps, steps that do not add up to ``max_steps``, or a phase
            that trains nothing, an unknown group, or experts while adapters are off.
    """
    if not config.phases:
        raise ConfigError("phases: the list is empty; leave the key out for a run of one phase")
    steps = _phase_steps(config)
    starts = [sum(steps[:i]) for i in range(len(steps) + 1)]
    restarts = [
        0,
        *(s for s, p in zip(starts, config.phases, strict=False) if p.restart_schedule),
        starts[-1],
    ]
    phases = []
    for i, phase in enumerate(config.phases):
        _check_groups(i, phase.train, phase.adapters)
        temperature = phase.router_temperature or (config.moe.router_temperature,) * 2
        phases.append(
            Phase(
                index=i,
                name=phase.name,
                start=starts[i],
                end=starts[i + 1],
                train=tuple(group for group in GROUPS if group in phase.train),
                adapters=phase.adapters,
                mixing=_with_dataset_weights(phase.mixing or config.mixing, config),
                learning_rates=_learning_rates(config, i),
                router_temperature=(float(temperature[0]), float(temperature[1])),
                temperature_schedule=phase.router_temperature_schedule,
                gate=phase.gate,
                reinit=tuple(group for group in REINIT if group in phase.reinit),
                schedule_start=max(s for s in restarts if s <= starts[i]),
                schedule_end=min((s for s in restarts if s > starts[i]), default=starts[-1]),
            )
        )
    return phases


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of an optimiser step (counted from 0); the last one for steps past the end."""
    return next((phase for phase in phases if step < phase.end), phases[-1])


def lr_factor(config: Config, phase: Phase, step: int) -> float:
    """The share of the learning rate to use at ``step`` (counted from 0 over the run)."""
    total = phase.schedule_end - phase.schedule_start
    factor = SCHEDULES[config.lr_scheduler_type]
    return factor(step - phase.schedule_start, total, warmup_steps(config, total))


def learning_rates(config: Config, phases: Sequence[Phase], step: int) -> dict[str, float]:
    """The learning rate of every group at ``step``; 0 for the groups that do not train in its phase."""
    phase = phase_at(phases, step)
    factor = lr_factor(config, phase, step)
    return {g: rate * factor if g in phase.train else 0.0 for g, rate in phase.learning_rates.items()}


def _phase_steps(config: Config) -> list[int]:
    given = [phase.steps for phase in config.phases]
    total = sum(n for n in given if n is not None)
    open_ended = [i for i, n in enumerate(given) if n is None]
    if len(open_ended) > 1:
        raise ConfigError(
            f"phases: {len(open_ended)} phases have no steps ({', '.join(map(str, open_ended))}); "
            "only one can take what is left of max_steps"
        )
    if not open_ended and total != config.max_steps:
        raise ConfigError(
            f"phases: their steps add up to {total}, but max_steps is {config.max_steps}; change one"
        )
    if open_ended and total >= max(1, config.max_steps):  # a run may have no steps at all
        raise ConfigError(
            f"phases.{open_ended[0]}.steps: nothing is left for it; the other phases take {total} "
            f"of the {config.max_steps} of max_steps"
        )
    return [config.max_steps - total if n is None else n for n in given]


def _check_groups(i: int, train: Sequence[str], adapters: bool) -> None:
    unknown = [group for group in train if group not in GROUPS]
    if unknown:
        raise ConfigError(f"phases.{i}.train: {unknown[0]!r} is not one of {', '.join(GROUPS)}")
    if not train:
        raise ConfigError(f"phases.{i}.train: the phase trains nothing; name one of {', '.join(GROUPS)}")
    idle = [group for group in ("experts", "router", "task_embedding") if group in train]
    if idle and not adapters:
        raise ConfigError(
            f"phases.{i}.train: {', '.join(idle)} cannot train while phases.{i}.adapters is false; "
            "name base, heads or saved"
        )


def _learning_rates(config: Config, i: int) -> dict[str, float]:
    phase = config.phases[i]

    def first(*rates: float | None) -> float:
        return next(rate for rate in rates if rate is not None)

    main = first(phase.learning_rate, config.learning_rate)
    router = first(phase.router_learning_rate, config.router_learning_rate, ROUTER_FACTOR * main)
    return {
        "base": first(phase.base_learning_rate, config.base_learning_rate, main),
        "experts": main,
        "router": router,
        "task_embedding": first(
            phase.task_embedding_learning_rate, config.task_embedding_learning_rate, router
        ),
        "heads": main,
        "saved": main,
    }


def _with_dataset_weights(mixing: MixingConfig, config: Config) -> MixingConfig:
    """Explicit rates may stand beside the datasets instead of in ``mixing.weights``."""
    if mixing.strategy != "explicit" or mixing.weights:
        return mixing
    weights = {d.name: d.weight for d in config.datasets if d.weight is not None and d.name is not None}
    return replace(mixing, weights=weights or None)


def _linear_between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _exponential_between(start: float, end: float, share: float) -> float:
    return start ** (1 - share) * end**share


TEMPERATURES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear_between,
    "exponential": _exponential_between,
}

SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
}
