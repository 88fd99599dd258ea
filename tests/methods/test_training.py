"""Each method trains 200 steps on the test bed; docs/METHODS.md says whether it beats its control."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from taskmoe.train.config_io import load
from taskmoe.train.loop import train

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
LAST = 5  # logged means over 10 steps each
LEVEL = 0.03  # of the control's loss: a smaller difference is said to be none


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory, on_runs):
    """The mean training loss of the last 50 of 200 steps of a file, run once a session."""
    home = tmp_path_factory.mktemp("runs")

    def run_of(name: str) -> Path:
        of(name)
        return home / name

    @cache
    def of(name: str) -> float:
        folder = home / name
        given = [f"--output_dir={folder}", "--report_to=none"]
        config = load(ROOT / "configs" / "methods" / f"{name}.yaml", given)
        assert train(on_runs(config, run_of)) == 0
        rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        found = [row["train/loss"] for row in rows if "train/loss" in row]
        assert len(found) >= 20
        return sum(found[-LAST:]) / LAST

    return of


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_trains_and_what_is_said_of_it_is_so(path: Path, losses, claims):
    stated = claims[path.stem]["200 steps"]
    if stated.startswith("none: "):
        assert load(path).max_steps == 0
        return
    found = losses(path.stem)
    assert found == found, "not a number"
    if stated.startswith("is the control"):
        return
    verdict, _, rest = stated.partition(" `")
    control = rest.partition("`")[0]
    ratio = found / losses(control)
    level = abs(ratio - 1) <= LEVEL
    holds = {"beats": ratio < 1 and not level, "does not beat": ratio > 1 and not level, "level with": level}
    assert verdict in holds, f"{path.stem}: docs/METHODS.md says {stated!r}"
    assert holds[verdict], f"{found:.4f} against {losses(control):.4f} of {control}"
