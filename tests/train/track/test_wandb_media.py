"""What goes into tables and pictures; test_wandb_log.py reads the same back from a real run."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from plotly.colors import sample_colorscale

from taskmoe.moe.snapshot import Snapshot
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.track import wandb_media
from taskmoe.train.track.media import Media
from taskmoe.train.track.wandb_media import MAX_HEATS, MAX_ROWS, UNKNOWN, Bars, Lines, Picture, Table, items


def snapshot(num_tasks: int, num_groups: int = 1, num_experts: int = 4, heads: int = 1) -> Snapshot:
    gates = torch.rand(num_groups, num_tasks, heads, num_experts) + 0.1
    return Snapshot("task", {f"layers.{i}": gates_THE for i, gates_THE in enumerate(gates)})


def tasks(number: int) -> TaskTable:
    return TaskTable.from_names([f"T {i}" for i in range(number)])


def test_nothing_to_show() -> None:
    assert items(Media(tasks(2)), "brief") == ({}, [])
    assert items(Media(tasks(2), Snapshot("none", {}), Snapshot("none", {})), "detailed") == ({}, [])


def test_tasks_that_were_not_seen_are_in_no_table_and_grey_in_pictures() -> None:
    shown = snapshot(3)
    shown.gates["layers.0"][1] = math.nan
    found, remarks = items(Media(tasks(3), shown), "brief")
    gates, pairs, heat = (found[f"routing/{k}"] for k in ("gates", "similarity_table", "layers.0/heat"))
    assert isinstance(gates, Table) and isinstance(pairs, Table) and isinstance(heat, Picture)
    assert {row[2] for row in gates.rows} == {"T 0", "T 2"} and len(gates.rows) == 2 * 4
    assert [set(row[:2]) for row in pairs.rows] == [{"T 0", "T 2"}]
    assert heat.caption.endswith(", T 1")  # last
    rgb = heat.image.convert("RGB")
    assert rgb.getpixel((5, rgb.height - 5)) == UNKNOWN[1] != rgb.getpixel((5, 5))
    assert remarks == []


def test_a_model_nobody_has_used_yet() -> None:
    unseen = Snapshot("token", {"layers.0": torch.full((2, 1, 3), math.nan)})
    found, _ = items(Media(tasks(2), unseen, unseen), "brief")
    gates, pairs = found["routing/gates"], found["routing/similarity_table"]
    assert isinstance(gates, Table) and isinstance(pairs, Table)
    assert gates.rows == pairs.rows == [] and "routing/depth" not in found


@pytest.mark.parametrize("detail", ["brief", "detailed"])
def test_tables_are_capped_and_say_so(monkeypatch: pytest.MonkeyPatch, detail: str) -> None:
    monkeypatch.setitem(MAX_ROWS, detail, 50)
    monkeypatch.setitem(MAX_HEATS, detail, 2)
    found, remarks = items(Media(tasks(11), snapshot(11, num_groups=5, num_experts=2)), detail)
    gates, pairs = found["routing/gates"], found["routing/similarity_table"]
    assert isinstance(gates, Table) and isinstance(pairs, Table)
    assert list(dict.fromkeys(row[0] for row in gates.rows)) == ["layers.0", "layers.4"]  # 44 rows
    assert len(gates.rows) == 44 and len(pairs.rows) == 50
    assert {key for key in found if key.endswith("/heat")} == {f"routing/layers.{i}/heat" for i in (0, 4)}
    assert remarks == [
        "routing/gates holds 2 of 5 routing groups, 44 rows",
        "routing/<group>/heat: 2 of 5 routing groups",
        "routing/similarity_table: the most alike 50 of 55 pairs of tasks",
    ]


def test_a_group_larger_than_a_table_is_cut_between_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_ROWS, "brief", 30)
    found, remarks = items(Media(tasks(9), snapshot(9, num_experts=4, heads=2)), "brief")
    gates = found["routing/gates"]
    assert (
        isinstance(gates, Table) and len(gates.rows) == 24 and gates.rows[-1][:4] == ["layers.0", 1, "T 2", 3]
    )
    assert remarks[0] == "routing/gates holds 1 of 1 routing groups, 24 rows"


def test_pairs_begin_with_what_matters() -> None:
    cosines = [[1.0, 0.5, -0.2], [0.5, 1.0, math.nan], [-0.2, math.nan, 1.0]]
    conflict = ([["t-0"], ["t-1"], ["t-2"]], cosines)
    found, _ = items(Media(tasks(3), conflict=conflict), "brief")
    table, picture = found["grad/conflict_table"], found["grad/conflict"]
    assert isinstance(table, Table) and isinstance(picture, Picture)
    assert table.rows == [["T 0", "T 2", -0.2], ["T 0", "T 1", 0.5]]  # the worst conflict first
    assert picture.caption.startswith("cosine of gradients, red -1")
    similar, _ = items(Media(tasks(3), snapshot(3)), "brief")
    alike = similar["routing/similarity_table"]
    assert isinstance(alike, Table) and [row[2] for row in alike.rows] == sorted(
        (row[2] for row in alike.rows), reverse=True
    )


def test_conflicts_lie_in_the_order_of_the_routing() -> None:
    shown = snapshot(3)
    shown.gates["layers.0"][2] = shown.gates["layers.0"][0]
    conflict = ([["t-0"], ["t-1"], ["t-2"]], np.eye(3).tolist())
    found, _ = items(Media(tasks(3), shown, conflict=conflict), "brief")
    orders = [found[key].caption.partition("columns: ")[2] for key in ("grad/conflict", "routing/similarity")]
    assert orders[0] == orders[1] and orders[0].split(", ")[1] != "T 1"


def test_results_of_tasks_with_other_metrics() -> None:
    results = {
        "T 0": {"f1": 0.5, "loss": math.nan, "rows": 3, "metric": "f1"},
        "T 1": {"accuracy": 0.25, "loss": 1.0, "rows": 4, "metric": "accuracy"},
    }
    found, _ = items(Media(tasks(2), results={"tasks": results}), "brief")
    table, bars = found["eval/table"], found["eval/by_task"]
    assert isinstance(table, Table) and isinstance(bars, Bars)
    assert table.columns == ["task", "group", "score", "metric", "loss", "rows", "accuracy", "f1"]
    assert table.rows[0] == ["T 0", None, 0.5, "f1", None, 3, None, 0.5]
    assert bars.table.rows == [["T 1", 0.25], ["T 0", 0.5]]  # the weakest first


def test_bars_are_of_the_weakest_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_media, "MAX_BARS", 2)
    results = {f"T {i}": {"f1": i / 10, "loss": 1.0, "rows": 3, "metric": "f1"} for i in range(3)}
    found, _ = items(Media(tasks(3), results={"tasks": results}), "brief")
    bars = found["eval/by_task"]
    assert isinstance(bars, Bars) and bars.title == "score of the 2 weakest tasks"
    assert [row[0] for row in bars.table.rows] == ["T 0", "T 1"]


def test_depth_shows_the_start_only_where_it_is_known() -> None:
    uniform = Snapshot("task", {"layers.0": torch.ones(2, 1, 4), "layers.1": torch.ones(2, 1, 4)})
    one = Snapshot("task", {name: torch.eye(4)[:2].unsqueeze(1) for name in uniform.gates})
    found, _ = items(Media(tasks(2), one, uniform), "brief")
    lines = found["routing/depth"]
    assert isinstance(lines, Lines)
    assert lines.series == {
        "effective experts": [1.0, 1.0],
        "dead experts": [2.0, 2.0],
        "effective experts at the start": pytest.approx([4.0, 4.0]),
    }
    found, _ = items(Media(tasks(2), one, None), "brief")
    alone = found["routing/depth"]
    assert isinstance(alone, Lines) and list(alone.series) == ["effective experts", "dead experts"]


def test_a_picture_is_made_of_squares_of_the_colour_scale() -> None:
    values = np.array([[-1.0, 0.0, 1.0], [np.nan, 3.0, -3.0]])
    image = wandb_media.picture(values, "RdBu", -1.0, 1.0)
    side = wandb_media.PIXELS // 3
    assert image.size == (3 * side, 2 * side)
    scale = sample_colorscale("RdBu", np.array([0.0, 0.5, 1.0]), colortype="tuple")
    low, middle, high = (tuple(round(255 * c) for c in colour) for colour in scale)
    rgb = image.convert("RGB")
    seen = [[rgb.getpixel((x * side + 1, (y + 1) * side - 2)) for x in range(3)] for y in range(2)]
    assert seen == [[low, middle, high], [UNKNOWN[1], high, low]]


def test_a_picture_of_many_tasks_has_a_pixel_for_each() -> None:
    assert wandb_media.picture(np.zeros((1000, 8)), "Viridis", 0.0, 0.0).size == (8, 1000)


def test_drawing_draws_no_random_number() -> None:
    media = Media(tasks(5), snapshot(5), snapshot(5), ([["t-0"], ["t-1"]], np.eye(2).tolist()))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    items(media, "detailed")
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_long_orders_are_cut_in_captions() -> None:
    found, _ = items(Media(tasks(70), snapshot(70)), "brief")
    assert found["routing/similarity"].caption.endswith(", and 6 more")


def test_spread() -> None:
    names = [str(i) for i in range(7)]
    assert wandb_media.spread(names, 9) == names
    assert wandb_media.spread(names, 3) == ["0", "3", "6"] and wandb_media.spread(names, 1) == ["0"]
