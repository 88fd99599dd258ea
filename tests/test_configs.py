"""Every YAML that is shipped loads, validates and survives the way to YAML and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskmoe.train.config_io import dump, load
from taskmoe.train.deepspeed_config import build
from taskmoe.train.schedule import resolve_phases

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in the files are relative to it


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_config(path: Path, tmp_path: Path) -> None:
    config = load(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config), encoding="utf-8")
    assert load(copy) == config
    assert resolve_phases(config)[-1].end == config.max_steps
    build(config, 2, config.deepspeed)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_config_begins_with_a_comment_that_says_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
