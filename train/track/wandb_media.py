"""Tables, images and charts of a run, as plain values that wandb is handed.

Legend: T tasks, H heads, E experts, W columns of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image
from plotly.colors import sample_colorscale
from torch import Tensor

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.track import routing
from taskmoe.train.track.media import Media

MAX_ROWS = {"brief": 2_500, "detailed": 10_000}  # of a table; wandb takes 0.1 ms for each
MAX_HEATS = {"brief": 8, "detailed": 64}  # pictures of routing groups
MAX_BARS = 100  # of a chart
MAX_NAMES = 64  # in a caption
PIXELS = 640  # of a picture's longer side, about
UNKNOWN = 255, (160, 160, 160)  # colour of what has not been seen


class Item(Protocol):
    """Something that wandb shows under one key."""

    def for_wandb(self, wandb: ModuleType) -> Any: ...


@dataclass(frozen=True)
class Table:
    """Rows of plain values; a column holds one type, and None."""

    columns: list[str]
    rows: list[list[Any]]

    def for_wandb(self, wandb: ModuleType) -> Any:
        # wandb would look at the type of each value; those of one whole row tell it all.
        whole = [next((v for v in column if v is not None), None) for column in zip(*self.rows, strict=True)]
        table = wandb.Table(columns=self.columns, data=[whole] if whole else [])
        table.data[:] = self.rows
        return table


@dataclass(frozen=True)
class Picture:
    """A matrix as coloured squares; the caption says what its rows are."""

    image: Image.Image
    caption: str

    def for_wandb(self, wandb: ModuleType) -> Any:
        return wandb.Image(self.image, caption=self.caption)


@dataclass(frozen=True)
class Bars:
    """One bar a row."""

    table: Table
    title: str

    def for_wandb(self, wandb: ModuleType) -> Any:
        label, value = self.table.columns
        return wandb.plot.bar(self.table.for_wandb(wandb), label, value, title=self.title)


@dataclass(frozen=True)
class Lines:
    """Series over one axis of positions."""

    series: dict[str, list[float]]
    title: str
    axis: str

    def for_wandb(self, wandb: ModuleType) -> Any:
        places = list(range(len(next(iter(self.series.values())))))
        return wandb.plot.line_series(places, list(self.series.values()), keys=list(self.series),
                                      title=self.title, xname=self.axis)  # fmt: skip


def items(media: Media, detail: str) -> tuple[dict[str, Item], list[str]]:
    """({key: what to show}, what was left out of it, a sentence each)."""
    found: dict[str, Item] = {}
    remarks: list[str] = []
    most = MAX_ROWS[detail]
    order = list(range(len(media.tasks)))
    if media.snapshot is not None and media.snapshot.gates:
        similarity_TT = routing.similarity(media.snapshot)
        order = routing.cluster(similarity_TT).order
        found["routing/gates"] = _gates(media.snapshot, media.tasks, most, remarks)
        found.update(_heats(media.snapshot, media.tasks, order, MAX_HEATS[detail], remarks))
        names = [task.name for task in media.tasks]
        values_TT = similarity_TT.numpy()
        found["routing/similarity"] = _matrix(values_TT, names, order, "Viridis", 0.0, "cosine of routing")
        found["routing/similarity_table"] = _pairs(values_TT, names, -1, most, remarks)
        depth = _depth(media.snapshot, media.first)
        if depth is not None:
            found["routing/depth"] = depth
    if media.conflict is not None:
        rows, matrix = media.conflict
        called = {task.slug: task.name for task in media.tasks}
        names = [" + ".join(called[slug] for slug in slugs) for slugs in rows]
        place = {media.tasks[t].slug: i for i, t in enumerate(order)}
        near = sorted(range(len(rows)), key=lambda i: min(place[slug] for slug in rows[i]))
        cosines_RR = np.array(matrix, dtype=float)
        found["grad/conflict"] = _matrix(cosines_RR, names, near, "RdBu", -1.0, "cosine of gradients")
        found["grad/conflict_table"] = _pairs(cosines_RR, names, 1, most, remarks)
    if media.results is not None:
        found["eval/table"], found["eval/by_task"] = _results(media.results["tasks"], media.tasks, most)
    return found, remarks


# -- tables --------------------------------------------------------------------------------------------------


def _gates(snapshot: Snapshot, tasks: TaskTable, most: int, remarks: list[str]) -> Table:
    """A row for each gate of the tasks that have been seen; of as many groups as there is room for."""
    sizes = {group: gates.numel() for group, gates in snapshot.gates.items()}
    number = next((n for n in range(len(sizes), 0, -1) if sum(sizes[g] for g in spread(sizes, n)) <= most), 1)
    chosen = spread(sizes, number)
    rows: list[list[Any]] = []
    for group in chosen:
        H, E = snapshot.gates[group].shape[1:]
        for t, gates_HE in enumerate(snapshot.gates[group][: most // (H * E)].tolist()):
            for h, gates_E in enumerate(gates_HE):
                if not any(math.isnan(gate) for gate in gates_E):
                    rows += [[group, h, tasks[t].name, e, gate] for e, gate in enumerate(gates_E)]
    if sum(sizes.values()) > most:
        remarks.append(f"routing/gates holds {number} of {len(sizes)} routing groups, {len(rows):,} rows")
    return Table(["layer", "head", "task", "expert", "gate"], rows)


def _pairs(values_RR: np.ndarray, names: Sequence[str], sign: int, most: int, remarks: list[str]) -> Table:
    """Each pair once: the largest value first where ``sign`` is -1, else the smallest."""
    first, second = np.triu_indices(len(names), 1)
    values = values_RR[first, second]
    known = np.flatnonzero(~np.isnan(values))
    ranked = known[np.argsort(sign * values[known], kind="stable")]
    if len(ranked) > most:
        which = "routing/similarity_table: the most" if sign < 0 else "grad/conflict_table: the least"
        remarks.append(f"{which} alike {most:,} of {len(ranked):,} pairs of tasks")
    rows = [[names[first[i]], names[second[i]], float(values[i])] for i in ranked[:most].tolist()]
    return Table(["task", "other", "cosine"], rows)


def _results(results: dict[str, dict[str, Any]], tasks: TaskTable, most: int) -> tuple[Table, Bars]:
    """A row a task with all its metrics, and a bar for the score, which is the task's own metric."""
    general = ("metric", "loss", "rows")
    others = sorted({name for scores in results.values() for name in scores} - set(general))
    rows, bars = [], []
    for name, scores in results.items():
        own = scores[scores["metric"]]
        group = tasks[tasks.id(name)].group
        values = [scores[n] for n in general] + [scores.get(n) for n in others]
        rows.append([name, group, own, *(None if v != v else v for v in values)])
        bars.append([name, own])
    table = Table(["task", "group", "score", *general, *others], rows[:most])
    shown = sorted(bars, key=lambda bar: bar[1])[:MAX_BARS]
    title = "score of each task" if len(shown) == len(bars) else f"score of the {MAX_BARS} weakest tasks"
    return table, Bars(Table(["task", "score"], shown), title)


def _depth(snapshot: Snapshot, first: Snapshot | None) -> Lines | None:
    """Effective and dead experts of each group, from the first to the last."""
    before = {} if first is None else first.gates
    found = [(group, routing.group_metrics(gates)) for group, gates in snapshot.gates.items()]
    found = [(group, numbers) for group, numbers in found if numbers]
    if not found:
        return None
    series = {
        "effective experts": [numbers["effective_experts"] for _, numbers in found],
        "dead experts": [numbers["dead_experts"] for _, numbers in found],
    }
    start = [routing.group_metrics(before[group]) if group in before else {} for group, _ in found]
    if all(start):
        series["effective experts at the start"] = [numbers["effective_experts"] for numbers in start]
    return Lines(series, "experts in use, by routing group", "routing group")


# -- pictures ------------------------------------------------------------------------------------------------


def _heats(
    snapshot: Snapshot, tasks: TaskTable, order: Sequence[int], most: int, remarks: list[str]
) -> dict[str, Item]:
    """A picture of the shares for each of at most ``most`` groups, from the first to the last."""
    chosen = spread(snapshot.gates, most)
    if len(chosen) < len(snapshot.gates):
        remarks.append(f"routing/<group>/heat: {len(chosen)} of {len(snapshot.gates)} routing groups")
    rows = _listed([tasks[t].name for t in order])
    found: dict[str, Item] = {}
    for group in chosen:
        shares_THE = routing.shares(snapshot.gates[group])
        H, E = shares_THE.shape[1:]
        shares_TW = _side_by_side(shares_THE[list(order)])
        top = float(np.nanmax(shares_TW)) if not np.isnan(shares_TW).all() else 1.0
        heads = f", {H} heads side by side" if H > 1 else ""
        caption = f"{group}: share of each of {E} experts{heads}, dark 0 to bright {top:.3g}; rows: {rows}"
        found[f"routing/{group}/heat"] = Picture(picture(shares_TW, "Viridis", 0.0, top), caption)
    return found


def _side_by_side(shares_THE: Tensor) -> np.ndarray:
    """[T, W]: the heads' experts, an empty column between heads."""
    values_THE = shares_THE.numpy()
    gap = np.full((len(values_THE), 1), np.nan)
    parts = [part for h in range(values_THE.shape[1]) for part in (values_THE[:, h], gap)]
    return np.concatenate(parts[:-1], axis=1)


def _matrix(
    values_RR: np.ndarray, names: Sequence[str], order: Sequence[int], colours: str, low: float, what: str
) -> Picture:
    """Rows and columns in one order; the scale ends at 1."""
    rows = _listed([names[i] for i in order])
    scale = {"Viridis": "dark 0 to bright 1", "RdBu": "red -1 over white 0 to blue 1"}[colours]
    image = picture(values_RR[np.ix_(order, order)], colours, low, 1.0)
    return Picture(image, f"{what}, {scale}; rows and columns: {rows}")


def picture(values_TW: np.ndarray, colours: str, low: float, high: float) -> Image.Image:
    """A square of pixels for each value, coloured between ``low`` and ``high``; grey where it is NaN.

    Args:
        colours: a colour scale of plotly's.
    """
    unknown = UNKNOWN[0]
    scaled_TW = np.rint(np.clip((values_TW - low) / max(high - low, 1e-12), 0, 1) * (unknown - 1))
    image = Image.fromarray(np.nan_to_num(scaled_TW, nan=unknown).astype(np.uint8))
    image.putpalette(_palette(colours))
    T, W = values_TW.shape
    times = max(1, PIXELS // max(T, W))
    return image.resize((W * times, T * times), Image.Resampling.NEAREST)


@cache
def _palette(colours: str) -> bytes:
    """256 colours, the last of them for what is not known."""
    sampled = sample_colorscale(colours, np.linspace(0, 1, UNKNOWN[0]), colortype="tuple")
    return np.rint(255 * np.array(sampled)).astype(np.uint8).tobytes() + bytes(UNKNOWN[1])


# -- names ---------------------------------------------------------------------------------------------------


def spread(names: Any, most: int) -> list[str]:
    """At most so many names, evenly from the first to the last."""
    names = list(names)
    if len(names) <= most:
        return names
    return [names[round(i)] for i in np.linspace(0, len(names) - 1, most)]


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
