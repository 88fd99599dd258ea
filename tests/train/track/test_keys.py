from __future__ import annotations

import re
from pathlib import Path

import pytest

from taskmoe.train.track.keys import KEYS, RESERVED, Curves, pattern_of

DOCUMENT = Path(__file__).parents[3] / "docs" / "TRACKING.md"


@pytest.mark.parametrize(
    "key, pattern",
    [
        ("train/loss", "train/loss"),
        ("train/loss/loss", "train/loss/<task>"),
        ("eval/score", "eval/score"),
        ("eval/macro/loss", "eval/macro/loss"),
        ("eval/macro/f1", "eval/macro/<metric>"),
        ("eval/sum/f1:yes/no", "eval/<task>/<metric>"),
        ("eval/sum/rows", "eval/<task>/rows"),
        ("routing/entropy", "routing/entropy"),
        ("routing/model.layers.0.q_proj/entropy", "routing/<group>/<number>"),
        ("routing/model.layers.0.q_proj/heat", "routing/<group>/heat"),
        ("routing/model.layers.0.q_proj/head-3/entropy", "routing/<group>/<head>/<number>"),
        ("loss", None),
        ("train/loss/a/b", None),
    ],
)
def test_pattern_of(key: str, pattern: str | None) -> None:
    assert pattern_of(key) == pattern


def curves(said: list[str], detail: str = "detailed", max_keys: int = 1000) -> Curves:
    return Curves(detail, max_keys, said.append)


def test_brief_leaves_out_routing_groups_and_what_is_no_curve() -> None:
    said: list[str] = []
    values = {"train/loss": 1.0, "routing/entropy": 2.0, "routing/q/entropy": 3.0, "eval/sum/rows": 4.0}
    assert set(curves(said, "brief").select(values)) == {"train/loss", "routing/entropy"}
    assert set(curves(said).select(values)) == values.keys() - {"eval/sum/rows"}
    assert not said


def test_the_cap_is_said_once_and_leaves_room_for_the_whole_run() -> None:
    said: list[str] = []
    chosen = curves(said, max_keys=RESERVED + 3)
    groups = {f"routing/q{i}/entropy": float(i) for i in range(5)}
    assert list(chosen.select(groups)) == list(groups)[:3]
    assert len(said) == 1 and f"track.max_keys: {RESERVED + 3}" in said[0]
    assert "2 keys" in said[0] and "routing/q3/entropy" in said[0]
    whole = {f"learning_rate/p{i}": 0.1 for i in range(RESERVED + 5)}
    drawn = chosen.select({**groups, **whole, "train/loss/late": 1.0})
    assert list(drawn) == [*list(groups)[:3], *list(whole)[:RESERVED]]
    assert chosen.select(groups) == {key: groups[key] for key in list(groups)[:3]}  # the same ones every time
    assert len(said) == 1


def test_a_small_cap_is_for_the_whole_run() -> None:
    said: list[str] = []
    assert list(curves(said, max_keys=2).select({"weight/a": 1.0, "train/loss": 2.0})) == ["train/loss"]


def test_every_key_is_documented_as_what_it_is() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Keys")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines()]
    table = {
        name: kind.strip()
        for key, kind, *_ in (row for row in rows if len(row) >= 3)
        for name in re.findall(r"`([^`]+/[^`]+)`", key)
    }
    assert table == {pattern: key.kind for pattern, key in KEYS.items()}
