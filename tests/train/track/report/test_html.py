"""The file itself: whole, self-contained, with a run's texts as texts. How it draws: test_browser.py."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from taskmoe.train.track.facts import Facts
from taskmoe.train.track.report import write_report
from taskmoe.train.track.report.html import render
from taskmoe.train.track.report.payload import payload
from taskmoe.train.track.routing import similarity

EVIL = '</script><img src="x" onerror="document.title=1"> & <b>$x$</b>'  # as the tasks of conftest.py have it


class Page(HTMLParser):
    """Elements with their attributes, the texts of scripts, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += text
        else:
            self.text += text

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def facts(make_facts: Callable[..., Facts]) -> Facts:
    return make_facts()


@pytest.fixture
def page(facts: Facts) -> Page:
    return Page(render(facts))


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    assert {link["href"] for link in page.all("link")} == {"data:,"}
    assert all(a["href"].startswith("#") for a in page.all("a"))
    sources = [
        value for _, attributes in page.elements for name, value in attributes.items() if name == "src"
    ]
    assert sources == [] and page.all("base") == []


def test_the_policy_names_every_script_that_runs(page: Page) -> None:
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    running = [s for s, a in zip(page.scripts, page.all("script"), strict=True) if "type" not in a]
    hashes = [f"'sha256-{b64encode(sha256(s.encode()).digest()).decode()}'" for s in running]
    assert len(running) == 2 and rules["script-src"].split() == hashes
    assert rules["default-src"] == "'none'" and "connect-src" not in rules


def test_a_runs_texts_are_texts(page: Page, facts: Facts) -> None:
    assert facts.tasks[1].name == EVIL
    assert page.all("img") == [] and len(page.scripts) == 3
    assert EVIL in page.text  # among the tasks that fight
    data = json.loads(page.scripts[0])
    assert data["tasks"]["name"] == facts.tasks.names
    assert data == json.loads(json.dumps(payload(facts, similarity(facts.snapshot))))


def test_the_head_says_what_was_looked_at(page: Page, make_facts: Callable[..., Facts]) -> None:
    for text in ("families, step 100", "12 in 3 given groups", "low_rank · task_table · softmax", "tiny",
                 "0.900 (as trained), 0.400 (all gates equal), 0.100 (experts off)",
                 "recovers the 3 given groups"):  # fmt: skip
        assert text in page.text
    moe = {"bank": "lora", "router": "none"}
    saved = make_facts(
        kind="adapter", step=None, config={"moe": moe}, log=[], results=None, source=Path("x/saved")
    )
    text = Page(render(saved)).text
    assert "\nsaved\n" in text and "lora · none" in text and "score" not in text


def test_settings_stand_at_the_end_as_text(make_facts: Callable[..., Facts]) -> None:
    page = Page(render(make_facts(config={"run_name": "<i>run</i>", "seed": 3, "moe": None})))
    assert "seed: 3" in page.text and "<i>run</i>, step 100" in page.text and page.all("i") == []


def test_a_figure_that_is_missing_has_a_reason_in_its_place(make_facts: Callable[..., Facts]) -> None:
    page = Page(render(make_facts(conflict=None)))
    plots = [a["id"] for a in page.all("div") if a.get("class") == "plot"]
    figures = [a["id"].removesuffix("-figure") for a in page.all("figure")]
    assert len(figures) == 9 and set(figures) - set(plots) == {"conflict"}
    assert "surgery.matrix_steps" in page.text


def test_a_report_replaces_the_one_before(facts: Facts, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(facts, path)
    assert path.read_text(encoding="utf-8") == render(facts)
    assert list(tmp_path.iterdir()) == [path]


def test_equal_facts_make_equal_reports(facts: Facts) -> None:
    assert render(facts) == render(facts)
