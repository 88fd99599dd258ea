"""``taskmoe inspect RUN|CHECKPOINT``: the object of :mod:`taskmoe.train.inspection` as a page of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.text import Text

from taskmoe.train.inspection import CLEAR, NUMBERS, describe, narrowed
from taskmoe.train.output import page, print_json, print_table
from taskmoe.train.track.facts import gather

MOST_GROUPS, MOST_TASKS, MOST_EXPERTS, MOST_PAIRS = 40, 40, 32, 5  # lines of a table
Sheet = tuple[str, list[str], list[list[Any]], int]  # title, columns, lines, how many columns are names
HEADINGS = {"entropy": "entropy, nats", "effective_experts": "effective",
            "utilisation_max": "largest mean share", "dead_experts": "dead", "over_uniform": "over uniform",
            "between_tasks": "between tasks", "drift": "drift"}  # fmt: skip


def inspect(path: str, pattern: str | None, as_json: bool, html: str | None) -> int:
    """Print what there is to see of ``path``, with ``as_json`` as one JSON object.

    html: a file to write the report to.

    Returns:
        The exit code, 0.

    Raises:
        FactsError, SnapshotError, TaskError, ConfigError: as :func:`taskmoe.train.track.facts.gather`, and a
            ``pattern`` that names no routing group.
    """
    facts = narrowed(gather(path), pattern)
    if html is not None:
        from taskmoe.train.track.report import write_report

        write_report(facts, Path(html))
    if as_json:
        print_json(describe(facts))
    else:
        show(describe(facts), page())
        if html is not None:
            print(f"report: {html}")
    return 0


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the object of :func:`describe`: verdicts first."""
    step = "" if found["step"] is None else f", step {found['step']}"
    console.print(Text(f"{found['source']} ({found['kind']}{step})", style="bold"))
    console.print(Text(_summary(found)))
    for verdict in found["verdicts"]:
        console.print(Text(f"- {verdict}"))
    for table in (_groups, _experts, _tasks, _clusters, _conflicts):
        title, columns, rows, names = table(found)
        if rows:
            texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
            print_table(console, title, columns, texts, names)


def _summary(found: Mapping[str, Any]) -> str:
    chosen = [f"{key} {found['method'][key]}" for key in ("bank", "router", "gate") if found["method"][key]]
    scores = [f"{arm} {value:.4f}" for arm, value in found["scores"].items() if value is not None]
    loss = [] if found["loss"] is None else [f"training loss {found['loss']:.4f}"]
    share = found["conflicts"]["conflict_frac"]
    fights = [] if share is None else [f"{100 * share:.0f} % of pairs of tasks conflict"]
    size = f"{len(found['tasks'])} tasks, {len(found['groups'])} routing groups"
    return "; ".join([*chosen, size, *loss, *fights, *(["score: " + ", ".join(scores)] if scores else [])])


def _groups(found: Mapping[str, Any]) -> Sheet:
    groups: Mapping[str, Any] = found["groups"]
    title, rows = "routing groups", {name: [group] for name, group in groups.items()}
    if len(groups) > MOST_GROUPS:
        rows = _merged(groups)
        title = (
            f"{len(groups)} routing groups put together: means, dead experts added up (--layer: single ones)"
        )
    lines = []
    for name, members in rows.items():
        experts = sorted({member["num_experts"] for member in members})
        number = " to ".join(str(n) for n in dict.fromkeys((experts[0], experts[-1])))
        cells = [_total([member[key] for member in members]) for key in NUMBERS]
        lines.append([name, number, *cells])
    return title, ["group", "experts", *HEADINGS.values()], lines, 1


def _merged(groups: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Groups of a layer put together; where that leaves too many, those that differ in the layer alone."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: re.sub(r"(\.\d+)\..*", r"\1", name),
        lambda name: re.sub(r"\d+", "*", name),
    )
    for way in ways:
        rows: dict[str, list[Any]] = {}
        for name, group in groups.items():
            rows.setdefault(way(name), []).append(group)
        if len(rows) <= MOST_GROUPS:
            return rows
    return {"all": list(groups.values())}


def _total(values: Sequence[float | int | None]) -> str | None:
    """The mean of numbers, the sum of counts."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return str(sum(known)) if isinstance(known[0], int) else f"{fmean(known):.3f}"


def _experts(found: Mapping[str, Any]) -> Sheet:
    """Which tasks use an expert, where there are few enough to read."""
    experts = [(name, e, x) for name, g in found["groups"].items() for e, x in enumerate(g["experts"])]
    lines = []
    for name, e, expert in experts if len(experts) <= MOST_EXPERTS else []:
        users = ", ".join(f"{user['task']} {user['share']:.2f}" for user in expert["tasks"])
        lines.append([name if e == 0 else "", e, users or "nobody", _number(expert["share"])])
    return "experts", ["group", "expert", "used most by (share)", "mean share"], lines, 3


def _tasks(found: Mapping[str, Any]) -> Sheet:
    """Tasks of a cluster together, in the order of the tree."""
    by_name = {task["name"]: task for task in found["tasks"]}
    order = found["clusters"]["order"] or list(by_name)
    short = _short(list(found["groups"]))
    lines = []
    for task in [by_name[name] for name in order[:MOST_TASKS]]:
        near = task["nearest"]
        like = f"{near['task']} {near['cosine']:.2f}" if near else None
        tops = ", ".join(_place(short, top) for top in task["top_experts"])
        scores = (_number(task["loss"]), task["metric"], _number(task["value"]), _number(task["epochs"]))
        lines.append([task["name"], task["group"], task["cluster"], like, tops, *scores])
    title = "tasks" if len(order) <= MOST_TASKS else f"tasks: {MOST_TASKS} of {len(order)} (--json has all)"
    where = "top experts (group/expert share)" if any(short.values()) else "top experts (share)"
    columns = ["task", "group", "cluster", "routed most like (cosine)", where]
    return title, [*columns, "loss", "metric", "value", "epochs"], lines, len(columns)


def _place(short: Mapping[str, str], top: Mapping[str, Any]) -> str:
    where = f"{short[top['group']]}/" if short[top["group"]] else ""
    head = f"head {top['head']} " if top["head"] else ""
    return f"{head}{where}{top['expert']} {top['share']:.2f}"


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts at their ends that all share; nothing is left of a single one."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return dict.fromkeys(names, "")
    fewest = min(map(len, parts))
    front = next((i for i in range(fewest) if len({p[i] for p in parts}) > 1), fewest)
    back = next((i for i in range(fewest - front) if len({p[-1 - i] for p in parts}) > 1), fewest - front)
    return {name: ".".join(p[front : len(p) - back]) or name for name, p in zip(names, parts, strict=True)}


def _clusters(found: Mapping[str, Any]) -> Sheet:
    clusters = found["clusters"]
    lines = []
    for c, names in enumerate(clusters["members"]):
        more = f" and {len(names) - MOST_TASKS} more" if len(names) > MOST_TASKS else ""
        lines.append([c, ", ".join(names[:MOST_TASKS]) + more])
    title, score = "clusters of tasks by their routing", clusters["silhouette"]
    if score is not None:
        title += (
            f" (silhouette {score:.2f})" if score >= CLEAR else f": no clear ones (silhouette {score:.2f})"
        )
    return title, ["cluster", "tasks"], lines, 2


def _conflicts(found: Mapping[str, Any]) -> Sheet:
    pairs = found["conflicts"]["pairs"][:MOST_PAIRS]
    lines = [[" + ".join(p["tasks"]), " + ".join(p["others"]), _number(p["cosine"])] for p in pairs]
    return "tasks that disagree most", ["tasks", "others", "cosine of gradients"], lines, 2


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
