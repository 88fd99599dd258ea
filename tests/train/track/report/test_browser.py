"""The report in a real browser: figures drawn, switches that work, no word on the console, no request.

It needs Chromium, and is skipped without: ``apt-get install chromium``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.track.facts import Facts
from taskmoe.train.track.report import write_report
from taskmoe.train.track.routing import cluster, shares, similarity

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


class View:
    """A report that is open, and what went wrong in it."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.troubles, self.requests = page, [], []  # type: ignore[var-annotated]
        page.on("console", lambda message: self.troubles.append(message.text))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri())

    def drawn(self, figure: str) -> int:
        """How often it has been drawn, once it has been."""
        self.page.locator(f"#{figure}").scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#{figure}[data-drawn]")
        return int(self.page.get_attribute(f"#{figure}", "data-drawn"))

    def after(self, change: Callable[[], Any], figure: str) -> None:
        """Make a change and wait until the figure is drawn anew."""
        times = self.drawn(figure)
        change()
        expect(self.page.locator(f"#{figure}")).not_to_have_attribute("data-drawn", str(times))

    def choose(self, control: str, value: str, figure: str = "gates") -> None:
        self.after(lambda: self.page.select_option(f"#{control}", value), figure)

    def z(self, figure: str) -> np.ndarray:
        """The numbers of a heat map, row by row; NaN where there is none."""
        self.drawn(figure)
        rows = self.page.eval_on_selector(
            f"#{figure}", "box => box.data[0].z.map((row) => Array.from(row, String))"
        )
        return np.array([[float(v) for v in row] for row in rows])

    def names(self, figure: str) -> list[str]:
        """The texts beside its rows, as they are seen."""
        self.drawn(figure)
        return self.page.locator(f"#{figure} .ytick text").all_text_contents()

    def note(self, figure: str) -> str:
        return str(self.page.text_content(f"#{figure}-note"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Callable[[Facts], View]]:
    views: list[View] = []

    def open_it(facts: Facts) -> View:
        path = tmp_path / f"{len(views)}.html"
        write_report(facts, path)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        views.append(View(page, path))
        return views[-1]

    yield open_it
    for view in views:
        view.page.close()
        assert view.troubles == []
        assert [url for url in view.requests if not url.startswith(("data:", "blob:"))] == view.requests[:1]
        assert view.requests[0].startswith("file:///")


def test_every_figure_is_drawn(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    view = open_report(make_facts())
    figures = view.page.eval_on_selector_all(".plot", "boxes => boxes.map((box) => box.id)")
    assert len(figures) == 9
    for figure in figures:
        assert view.drawn(figure) == 1
        marks = view.page.locator(f"#{figure} .plot-container :is(image, .scatterlayer path)").count()
        assert marks > 0, figure
        assert view.page.locator(f"#{figure}-figure figcaption").inner_text().startswith("How to read:")


def test_the_heat_map_shows_the_gates(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    facts = make_facts(heads=2)
    view = open_report(facts)
    order = cluster(similarity(facts.snapshot)).order
    for i, (name, gates_THE) in enumerate(facts.snapshot.gates.items()):
        if view.page.input_value("#layer") != str(i):
            view.choose("layer", str(i))
        np.testing.assert_allclose(view.z("gates"), shares(gates_THE).mean(1)[order], atol=0.003)
        assert name.removeprefix("model.layers.") in view.note("gates") and "expert 7" in view.note("gates")
    view.choose("head", "1")
    np.testing.assert_allclose(view.z("gates"), shares(gates_THE)[order, 1], atol=0.003)
    view.choose("view", "change")
    np.testing.assert_allclose(view.z("gates"), shares(gates_THE)[order, 1] - 1 / 8, atol=0.005)
    view.choose("order", "listed")
    np.testing.assert_allclose(view.z("gates"), shares(gates_THE)[:, 1] - 1 / 8, atol=0.005)
    view.after(lambda: view.page.click("#layer-before"), "gates")
    assert view.page.input_value("#layer") == "1"


def test_hovering_and_clicking(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    facts = make_facts(layers=1)
    view = open_report(facts)
    view.drawn("gates")
    box = view.page.locator("#gates .nsewdrag").first.bounding_box()
    over = (
        box["x"] + box["width"] * 2.5 / 8,
        box["y"] + box["height"] * 0.5 / 12,
    )  # the third column, first row
    view.page.mouse.move(*over, steps=5)
    text = view.page.locator("#gates .hovertext").first.text_content(timeout=10_000)
    first = cluster(similarity(facts.snapshot)).order[0]
    share = float(facts.snapshot.gates["model.layers.0.mlp"][first, 0, 2])
    assert facts.tasks[first].name in text and "expert 2" in text
    assert float(text.rsplit(" ", 1)[1]) == pytest.approx(share, abs=0.003)
    view.page.mouse.down()
    view.page.mouse.up()
    expect(view.page.locator("#number")).to_have_value("2")
    in_order = facts.snapshot.gates["model.layers.0.mlp"][cluster(similarity(facts.snapshot)).order, 0, 2]
    np.testing.assert_allclose(view.z("expert")[:, 0], in_order, atol=0.003)
    assert "have an expert 2" in view.note("expert")


def test_names_are_texts_in_figures_too(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    facts = make_facts()
    view = open_report(facts)
    for figure in ("gates", "similarity", "conflict", "expert"):
        names = view.names(figure)
        assert sum(name.startswith("</script><img") and name.endswith("<b>$x$</b>") for name in names) == 1, (
            figure
        )
        assert len(names) == 12
    view.drawn("curves")
    view.drawn("table")
    assert view.page.locator("body").get_by_text(facts.tasks[1].name).count() > 0
    assert view.page.locator("img").count() == 0 and view.page.title() == "Routing: families, step 100"


def test_conflicts_stand_in_the_order_of_the_clusters(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    facts = make_facts()
    assert facts.conflict is not None
    view = open_report(facts)
    order = cluster(similarity(facts.snapshot)).order
    expected = np.array(facts.conflict[1])[order][:, order]
    np.testing.assert_allclose(view.z("conflict"), expected, atol=0.005)
    assert view.note("conflict").startswith("Most opposed: ") and "(-0.30)" in view.note("conflict")


def test_tasks_are_picked_for_curves(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    view = open_report(make_facts())

    def lines() -> list[str]:
        return view.page.eval_on_selector("#curves", "box => box.data.map((line) => line.name)")

    view.drawn("curves")
    assert len(lines()) == 7 and lines()[-1] == "all tasks"
    view.after(lambda: view.page.click("#none"), "curves")
    assert lines() == ["all tasks"]
    view.page.fill("#find", "then 11")
    view.after(lambda: view.page.select_option("#picked", label="rotate then 11"), "curves")
    assert lines() == ["rotate then 11", "all tasks"]
    view.choose("family", "metric", "curves")
    values = view.page.eval_on_selector("#curves", "box => Array.from(box.data[0].y)")
    assert values == pytest.approx([0.5 * 0.94, 0.94], rel=1e-5)


def test_the_table_sorts_and_finds(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    view = open_report(make_facts())

    def column(number: int) -> list[str]:
        return view.page.locator(f"#table tbody tr > :nth-child({number})").all_text_contents()

    view.drawn("table")
    assert view.page.locator("#table thead th").count() == 11 and len(column(1)) == 12
    view.after(lambda: view.page.click("#table thead button:text('epochs')"), "table")
    epochs = [float(text) for text in column(4)]
    assert epochs == sorted(epochs) and len(set(epochs)) == 12
    view.after(lambda: view.page.click("#table thead button:text('epochs')"), "table")
    assert [float(text) for text in column(4)] == epochs[::-1]
    facts = make_facts()
    gone = f"train/epochs/{facts.tasks[4].slug}"
    some = open_report(make_facts(log=[{k: v for k, v in line.items() if k != gone} for line in facts.log]))
    some.drawn("table")
    for _ in range(2):  # rising, then falling
        some.after(lambda: some.page.click("#table thead button:text('epochs')"), "table")
        assert some.page.locator("#table tbody tr > :nth-child(4)").last.text_content() == "–"
    view.after(lambda: view.page.fill("#search", "MIRROR"), "table")
    assert set(column(2)) == {"mirror"} and view.page.text_content("#count") == "4 of 12 tasks"


def test_what_is_not_known_draws_nothing_and_breaks_nothing(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View]
) -> None:
    nothing = make_facts(snapshot=Snapshot("none", {}), first=None, log=[], results=None, conflict=None)
    view = open_report(nothing)
    assert view.drawn("table") == 1
    assert view.page.locator(".plot").count() == 0 and view.page.locator(".missing").count() == 9
    gates = {name: g.clone() for name, g in make_facts(experts=5).snapshot.gates.items()}
    for name, g in gates.items():
        g[4:6] = math.nan
        if name.endswith("1.mlp"):
            gates[name] = g[:, :, :3]
    view = open_report(make_facts(snapshot=Snapshot("token", gates), conflict=None))
    for figure in view.page.eval_on_selector_all(".plot", "boxes => boxes.map((box) => box.id)"):
        view.drawn(figure)
    view.choose("number", "4", "expert")
    expected = np.array([[t in (4, 5) or layer == 1 for layer in range(3)] for t in range(12)])
    order = cluster(similarity(Snapshot("token", gates))).order
    np.testing.assert_array_equal(np.isnan(view.z("expert")), expected[order])


def test_a_thousand_tasks_open_fast(
    make_facts: Callable[..., Facts], open_report: Callable[[Facts], View], tmp_path: Path
) -> None:
    """Time is the processor's: other work on the machine does not count."""
    view = open_report(make_facts(num_tasks=1000, layers=48, experts=64))
    assert (tmp_path / "0.html").stat().st_size < 20e6
    view.drawn("gates")
    session = view.page.context.new_cdp_session(view.page)
    session.send("Performance.enable")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    assert 0 < metrics["ProcessTime"] < 5
    assert view.z("gates").shape == (1000, 64)
    for figure in view.page.eval_on_selector_all(".plot, #table", "boxes => boxes.map((box) => box.id)"):
        view.drawn(figure)
