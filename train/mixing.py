"""Which task each sequence comes from: the rates of a mixture, and a sampler that can be resumed to the row.

A mixture turns the sizes of the training sets into rates that sum to one; the sampler turns rates into an
endless stream of (task, row). Neither knows of ranks: a loop draws for the whole optimiser step and deals the
rows out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import MixingConfig

# Streams of random numbers under one seed: the choice of tasks, and each task's order of rows.
_CHOICE, _ORDER = 0, 1

Mixture = Callable[[MixingConfig, Sequence[int], Sequence[str], "list[float]", int], "list[float]"]


def rates(
    config: MixingConfig,
    sizes: Sequence[int],
    names: Sequence[str],
    budget: int,
    drawn: Sequence[int] | None = None,
) -> list[float]:
    """The share of each task in the sequences of a phase; the shares sum to one.

    Args:
        sizes: training rows of each task; a task without rows gets the rate 0.
        names: the tasks' names, for ``explicit`` weights and messages.
        budget: sequences the phase will draw, over all ranks (``unimax`` needs it).
        drawn: rows already drawn of each task by earlier phases; ``unimax`` counts them as repeats spent.

    Raises:
        ConfigError: an unknown strategy, a missing or unusable setting, or no task with rows.
    """
    if len(sizes) != len(names):
        raise ConfigError(f"mixing: {len(sizes)} sizes for {len(names)} tasks")
    if not any(sizes):
        raise ConfigError("mixing: no task has a training row; check the datasets")
    if config.strategy not in MIXTURES:
        near = difflib.get_close_matches(str(config.strategy), MIXTURES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"mixing.strategy: {config.strategy!r} is not one of {', '.join(MIXTURES)}; nearest is {near!r}"
        )
    spent = [0.0] * len(sizes) if drawn is None else [float(n) for n in drawn]
    shares = MIXTURES[config.strategy](config, sizes, names, spent, budget)
    total = math.fsum(shares)
    return [share / total for share in shares]


def expected_epochs(rates: Sequence[float], sizes: Sequence[int], budget: int) -> list[float]:
    """How often ``budget`` draws go through each task's rows, on average; 0 for a task without rows."""
    return [rate * budget / size if size else 0.0 for rate, size in zip(rates, sizes, strict=True)]


def excess(
    config: MixingConfig,
    sizes: Sequence[int],
    names: Sequence[str],
    budget: int,
    drawn: Sequence[int] | None = None,
) -> int:
    """Draws beyond what ``unimax`` allows with ``max_epochs`` of every task; 0 for other strategies.

    When it is positive the budget cannot be spent within the bound: the rates stay normalised and every task
    is repeated more often than ``max_epochs`` by the same factor. A loop should say so.
    """
    if config.strategy != "unimax":
        return 0
    spent = [0] * len(sizes) if drawn is None else drawn
    allowed = sum(max(0.0, config.max_epochs * n - s) for n, s in zip(sizes, spent, strict=True))
    return max(0, math.ceil(budget - allowed))


def proportional(
    config: MixingConfig, sizes: Sequence[int], names: Sequence[str], spent: list[float], budget: int
) -> list[float]:
    """n_t: every row is as likely as any other."""
    return [float(n) for n in sizes]


def equal(
    config: MixingConfig, sizes: Sequence[int], names: Sequence[str], spent: list[float], budget: int
) -> list[float]:
    """1 for every task with rows."""
    return [1.0 if n else 0.0 for n in sizes]


def temperature(
    config: MixingConfig, sizes: Sequence[int], names: Sequence[str], spent: list[float], budget: int
) -> list[float]:
    """min(n_t, cap)^(1/T), the cap before the temperature (T5, Raffel et al. 2020)."""
    if not config.temperature > 0:
        raise ConfigError(f"mixing.temperature: {config.temperature} is not positive")
    cap = math.inf if config.cap is None else config.cap
    return [min(n, cap) ** (1 / config.temperature) if n else 0.0 for n in sizes]


def capped(
    config: MixingConfig, sizes: Sequence[int], names: Sequence[str], spent: list[float], budget: int
) -> list[float]:
    """min(n_t, cap): examples-proportional with an artificial limit (T5, Raffel et al. 2020)."""
    if config.cap is None or config.cap < 1:
        raise ConfigError(
            f"mixing.cap: strategy 'capped' needs a positive number of examples, found {config.cap}"
        )
    return [float(min(n, config.cap)) for n in sizes]


def explicit(
    config: MixingConfig, sizes: Sequence[int], names: Sequence[str], spent: list[float], budget: int
) -> list[float]:
    """The weights given; a task that is not named is not drawn."""
    weights = config.weights or {}
    for name, weight in weights.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or list(names)[:5]
            raise ConfigError(f"mixing.weights.{name}: no such task; the nearest are {', '.join(near)}")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"mixing.weights.{name}: {weight} is not a finite number >= 0")
        if weight and not sizes[list(names).index(name)]:
            raise ConfigError(f"mixing.weights.{name}: the task has no training rows; give it weight 0")
    if not any(weights.values()):
        raise ConfigError("mixing.weights: strategy 'explicit' needs a positive weight for at least one task")
    return [float(weights.get(name, 0.0)) for name in names]


def unimax(
    config: MixingConfig, sizes: Sequence[int], names: Sequence[str], spent: list[float], budget: int
) -> list[float]:
    """Equal shares, but no task more than ``max_epochs`` times (UniMax, Chung et al. 2023).

    From the smallest allowance up, each task gets an equal part of the budget that is left or its allowance
    ``max_epochs * n_t``, whichever is less: what small tasks cannot take goes to larger ones. When the
    allowances together are less than the budget they are the shares themselves (see :func:`excess`).
    """
    if not config.max_epochs > 0:
        raise ConfigError(f"mixing.max_epochs: {config.max_epochs} is not positive")
    if budget < 1:
        raise ConfigError(
            f"mixing: strategy 'unimax' needs a budget of at least one sequence, found {budget}"
        )
    allowance = [max(0.0, config.max_epochs * n - s) for n, s in zip(sizes, spent, strict=True)]
    if not any(allowance):  # earlier phases have spent everything: another round of allowances
        allowance = [config.max_epochs * n for n in sizes]
    shares, left = [0.0] * len(sizes), float(budget)
    order = sorted(range(len(sizes)), key=lambda t: allowance[t])
    for place, t in enumerate(order):
        shares[t] = min(left / (len(order) - place), allowance[t])
        left -= shares[t]
    return shares


class MixtureSampler:
    """An endless stream of (task, row), the same whatever the number of ranks.

    Which task stands at position i is a function of (seed, i) and the rates. Each task walks a permutation of
    its rows that is a function of (seed, task, epoch), so the state is one position and one count a task. New
    rates (a new phase) change the choice of tasks from here on and leave every task's walk where it is.

    Args:
        sizes: rows of each task.
        rates: share of each task, at least one positive; tasks without rows must have the rate 0.
        seed: any non-negative integer.

    Raises:
        ConfigError: rates that do not fit the sizes.
    """

    def __init__(self, sizes: Sequence[int], rates: Sequence[float], seed: int) -> None:
        self.sizes = [int(n) for n in sizes]
        self.seed = int(seed)
        self.position = 0
        self.drawn = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # task -> (epoch, permutation): a cache
        self.set_rates(rates)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Use other rates from the next draw on.

        Raises:
            ConfigError: rates that do not fit the sizes.
        """
        if len(rates) != len(self.sizes):
            raise ConfigError(f"mixing: {len(rates)} rates for {len(self.sizes)} tasks")
        for task, (rate, size) in enumerate(zip(rates, self.sizes, strict=True)):
            if not (rate >= 0 and math.isfinite(rate)):
                raise ConfigError(f"mixing: the rate of task {task} is {rate}; rates are finite and >= 0")
            if rate > 0 and size == 0:
                raise ConfigError(f"mixing: task {task} has the rate {rate} but no rows")
        if not any(rates):
            raise ConfigError("mixing: every rate is zero")
        self.rates = [float(rate) for rate in rates]
        bounds = np.cumsum(np.asarray(self.rates, dtype=np.float64))
        self._bounds = bounds / bounds[-1]
        # Rounding must not open a gap at the top that a task of rate 0 would fill.
        self._bounds[np.flatnonzero(self.rates)[-1] :] = 1.0

    def draw(self, n: int) -> list[tuple[int, int]]:
        """The next ``n`` pairs (task, row)."""
        tasks = np.searchsorted(self._bounds, self._uniforms(self.position, n), side="right")
        self.position += n
        return [(task, self._next_row(task)) for task in tasks.tolist()]

    def epochs(self) -> list[float]:
        """Rows drawn of each task, in units of its size."""
        return [count / size if size else 0.0 for count, size in zip(self.drawn, self.sizes, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain numbers, ready for JSON."""
        return {
            "seed": self.seed,
            "position": self.position,
            "sizes": list(self.sizes),
            "drawn": list(self.drawn),
            "rates": list(self.rates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; tasks appended since start at their first row, at the rates they have here.

        Raises:
            ConfigError: another seed, or other numbers of rows: it would not be the stream that was left.
        """
        if state["seed"] != self.seed:
            raise ConfigError(
                f"seed: the checkpoint's rows were drawn with seed {state['seed']}, this run has "
                f"{self.seed}; resume with the same seed"
            )
        known = len(state["sizes"])
        if list(state["sizes"]) != self.sizes[:known]:
            raise ConfigError(
                f"datasets: the checkpoint was trained on tasks of {state['sizes']} rows, "
                f"here they have {self.sizes[:known]}; resume with the same training rows"
            )
        self.position = int(state["position"])
        self.drawn = [int(n) for n in state["drawn"]] + [0] * (len(self.sizes) - known)
        self._orders = {}
        if known == len(self.sizes):
            self.set_rates(state["rates"])

    def _uniforms(self, start: int, n: int) -> np.ndarray:
        """[n] float64 in [0, 1): a function of the seed and the positions alone."""
        bits = self._bits(_CHOICE, 0)
        bits.advance(start // 4)  # a Philox block is four words
        words = bits.random_raw(start % 4 + n)[start % 4 :]
        return (words >> np.uint64(11)) * 2.0**-53

    def _next_row(self, task: int) -> int:
        epoch, place = divmod(self.drawn[task], self.sizes[task])
        if task not in self._orders or self._orders[task][0] != epoch:
            bits = self._bits(_ORDER, task)
            bits.advance(epoch * (self.sizes[task] // 4 + 1))
            words = bits.random_raw(self.sizes[task])
            self._orders[task] = epoch, np.argsort(words, kind="stable").astype(np.uint32)
        self.drawn[task] += 1
        return int(self._orders[task][1][place])

    def _bits(self, purpose: int, stream: int) -> np.random.Philox:
        # The raw words of a bit generator are fixed across versions of numpy; its distributions are not.
        return np.random.Philox(key=np.array([self.seed, (stream << 8) | purpose], dtype=np.uint64))


MIXTURES: dict[str, Mixture] = {
    "proportional": proportional,
    "equal": equal,
    "temperature": temperature,
    "capped": capped,
    "explicit": explicit,
    "unimax": unimax,
}
