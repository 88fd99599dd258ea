"""What ``taskmoe select`` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from taskmoe.train.output import page, print_json, print_table
from taskmoe.train.run_eval import stdout_is_stderr
from taskmoe.train.selection.grouping import Groups
from taskmoe.train.selection.scores import KS
from taskmoe.train.selection.select import Selection, select


def show(path: str, overrides: list[str], methods: list[str], as_json: bool, **settings: Any) -> int:
    """Select, then print tables, or one JSON object.

    Returns:
        The exit code, 0.

    Raises:
        SelectError and the others of :func:`taskmoe.train.selection.select.select`.
    """
    with stdout_is_stderr():
        found = select(path, overrides, methods, **settings)
    if as_json:
        print_json({"subject": path, **_numbers(found)})
        return 0
    console = page()
    for target in next(iter(found.rankings.values()), {}):
        _print_ranking(console, found, target)
    if found.scores:
        names = [*(f"regret@{k}" for k in KS), "ndcg"]
        rows = [[m, *(f"{s[n]:.4f}" for n in names), f"{s['targets']:.0f}"] for m, s in found.scores.items()]
        print_table(console, "against measured transfer", ["method", *names, "targets"], rows)
    for method, groups in found.groups.items():
        _print_groups(console, method, groups)
    return 0


def _numbers(found: Selection) -> dict[str, Any]:
    numbers: dict[str, Any] = {"tasks": found.tasks}
    if found.rankings:
        numbers["rankings"] = {
            method: {t: [{"task": s, "affinity": a} for s, a in row] for t, row in of_targets.items()}
            for method, of_targets in found.rankings.items()
        }
    if found.scores:
        numbers["scores"] = found.scores
    if found.groups:
        numbers["groups"] = {method: asdict(groups) for method, groups in found.groups.items()}
    return numbers


def _print_ranking(console: Console, found: Selection, target: str) -> None:
    """A column a method: sources from the best on, each with its affinity."""
    columns = [of_targets[target] for of_targets in found.rankings.values()]
    rows = [
        [str(place + 1), *(f"{source}  {_value(a)}" for source, a in row)]
        for place, row in enumerate(zip(*columns, strict=True))
    ]
    title = f"for {target}: sources, the most promising first"
    print_table(console, title, ["place", *found.rankings], rows, names=1 + len(columns))


def _print_groups(console: Console, method: str, groups: Groups) -> None:
    order = sorted(groups.label, key=lambda name: (groups.label[name] < 0, groups.label[name]))
    rows = [
        [name, str(groups.label[name] + 1), " ".join(f"{u:.2f}" for u in groups.membership[name])]
        if name in groups.membership
        else [name, "not known", ""]
        for name in order
    ]
    print_table(console, f"groups by {method}", ["task", "group", "membership of each"], rows, names=3)
    if groups.agreement is not None:
        count, index, p = (groups.agreement[k] for k in ("num_groups", "adjusted_rand_index", "p_value"))
        console.print(
            f"cut at {count:.0f} groups, as many as the task table has: adjusted Rand index with its groups "
            f"{index:.2f} (p = {p:.3f})"
        )


def _value(affinity: float) -> str:
    return "(not known)" if affinity != affinity else f"({affinity:.4g})"
