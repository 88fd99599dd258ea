"""Every YAML that is shipped loads, validates and survives the way to YAML and back."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from taskmoe.train import cli
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


def test_the_launch_line_of_a_large_run_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of ``deepspeed --num_gpus 8 --module taskmoe.train.cli train configs/llama_rank1.yaml ...``."""
    seen = []
    loop = SimpleNamespace(train=lambda config: seen.append(config) or 0)
    monkeypatch.setitem(sys.modules, "taskmoe.train.loop", loop)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    line = ["--local_rank=0", "train", "configs/llama_rank1.yaml", "--learning_rate", "3e-4"]
    assert cli.main(line) == 0
    assert seen == [load("configs/llama_rank1.yaml", ["--learning_rate=0.0003"])]
    assert (seen[0].moe.r, seen[0].moe.num_experts, seen[0].bf16) == (1, 32, True)
