"""How good a ranking of sources is, where transfer was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from taskmoe.moe import TaskTable
from taskmoe.train.selection.base import SelectError

KS = (1, 3)  # of Regret@k

Transfer = dict[str, dict[str, float]]  # {target: {source: score of the target, the more the better}}


def read_transfer(path: str | Path, tasks: TaskTable) -> Transfer:
    """A measured transfer matrix: JSON, ``{target: {source: score}}``; a task's score as its own source does
    not count.

    Raises:
        SelectError: unreadable, another shape, a score that is no finite number, or a target of which fewer
            than two sources were measured, or none with a positive score.
        TaskError: a task that is not compared; names the nearest.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SelectError(f"--matrix: {path} is no readable JSON file ({error})") from error
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise SelectError(f'--matrix: {path} is not {{"target": {{"source": score, ...}}, ...}}')
    found: Transfer = {}
    for target, row in rows.items():
        tasks.id(target)
        for source, score in row.items():
            tasks.id(source)
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not number or not math.isfinite(score):
                raise SelectError(f"--matrix: {path}: {target!r} from {source!r} has {score!r}, no number")
        found[target] = {source: float(score) for source, score in row.items() if source != target}
        if len(found[target]) < 2:
            raise SelectError(f"--matrix: {path}: {target!r} has fewer than two sources; there is no choice")
        _best(found[target], f"{path}: {target!r}: ")
    return found


def regret(measured: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Regret@k: (best - best of the first k) / best, in [0, 1] for positive scores (Poth et al. 2021).

    Args:
        measured: {source: score of the target}. ranking: of just these sources, best first.

    Raises:
        SelectError: the best score is not positive, so that no share of it can be lost.
    """
    best = _best(measured)
    return (best - max(measured[source] for source in ranking[:k])) / best


def _best(measured: Mapping[str, float], where: str = "") -> float:
    best = max(measured.values())
    if best <= 0:
        raise SelectError(
            f"--matrix: {where}the best score is {best:g}; Regret@k is a share of it, so give positive ones"
        )
    return best


def ndcg(measured: Mapping[str, float], ranking: Sequence[str]) -> float:
    """Normalised discounted cumulative gain in [0, 1]; 1: the measured order (Jarvelin and Kekalainen 2002).

    Gain 2^rel - 1 at place i over log2(i + 1), rel = (score - worst) / (best - worst), so that the unit of
    the scores does not matter. 1 where all sources are equal.

    Args:
        as of :func:`regret`.
    """
    low, high = min(measured.values()), max(measured.values())
    if low == high:
        return 1.0

    def dcg(order: Sequence[str]) -> float:
        gains = [2 ** ((measured[source] - low) / (high - low)) - 1 for source in order]
        return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))

    return dcg(ranking) / dcg(sorted(measured, key=lambda source: -measured[source]))


def score(transfer: Transfer, rankings: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``regret@1``, ``regret@3`` and ``ndcg``, means over the targets that are both ranked and measured.

    Sources that were not measured for a target are passed over. ``targets``: how many there were.

    Raises:
        SelectError: there is none.
    """
    both = [target for target in rankings if target in transfer]
    if not both:
        raise SelectError(f"--matrix: none of its targets is ranked: {', '.join(list(transfer)[:5])}")
    totals: dict[str, float] = {}
    for target in both:
        measured = transfer[target]
        order = [source for source in rankings[target] if source in measured]
        numbers = {f"regret@{k}": regret(measured, order, k) for k in KS}
        for name, value in {**numbers, "ndcg": ndcg(measured, order)}.items():
            totals[name] = totals.get(name, 0.0) + value / len(both)
    return {**totals, "targets": len(both)}
