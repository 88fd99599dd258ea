"""Every file of configs/methods/ as a model and batches, by the way a run takes, only smaller."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taskmoe.moe import TaskMoEModel
from taskmoe.train import checkpoint
from taskmoe.train.batches import build_batches
from taskmoe.train.config import Config, PhaseConfig
from taskmoe.train.config_io import dump, load
from taskmoe.train.distributed import Ranks
from taskmoe.train.export import ALL, export_run
from taskmoe.train.loop import train
from taskmoe.train.objectives import count, model_inputs, step_loss
from taskmoe.train.schedule import resolve_phases
from taskmoe.train.setup import Data, build_data, build_moe
from taskmoe.train.task_vectors import with_task_vectors

ROOT = Path(__file__).parents[2]
METHODS = {p.stem: p for p in sorted((ROOT / "configs" / "methods").glob("*.yaml"))}
ALONE = Ranks(0, 1, 0, torch.device("cpu"), owns_group=False)
NEEDED = re.compile(r"\./runs/(\w+)(/checkpoint-\d+|/loras)?")  # what an earlier run of a file leaves


@dataclass
class Method:
    """One file: its settings and its data; ``build`` gives a fresh model, ``batches`` the first batches."""

    name: str
    config: Config
    data: Data

    def build(self, train: tuple[str, ...] = ("experts", "router", "task_embedding")) -> TaskMoEModel:
        model = build_moe(self.config, self.data.tokenizer, self.data.bundle.tasks, ALONE)
        model.set_trainable(train)
        return model

    def batches(self, number: int) -> list[dict[str, Any]]:
        bundle = self.data.bundle
        found = build_batches(
            self.config,
            ALONE,
            resolve_phases(self.config),
            bundle.splits["train"],
            bundle.tasks.names,
            self.data.collator,
        )
        return [found.next_step(1)[0] for _ in range(number)]

    def loss(self, model: TaskMoEModel, batch: dict[str, Any], logits: Tensor | None = None) -> Tensor:
        n_tasks = len(self.data.bundle.tasks)
        if logits is None:
            logits = self.logits(model, batch)
        task_type = self.config.task_type
        weights = torch.ones(n_tasks, dtype=torch.float64)
        return step_loss(logits, batch, count(batch, task_type, n_tasks), weights, task_type=task_type)[0]

    def logits(self, model: TaskMoEModel, batch: dict[str, Any]) -> Tensor:
        inputs = model_inputs(batch, self.config.task_type, model.config, torch.device("cpu"))
        return model(**inputs).logits


def of_few_rows(config: Config) -> Config:
    """The same tasks, tokenizer and model."""
    assert config.data.skill_gym is not None, f"{config.run_name}: extend configs/skill_gym.yaml"
    gym = replace(config.data.skill_gym, train_rows=40, validation_rows=8, test_rows=8)
    return replace(config, data=replace(config.data, skill_gym=gym))


@cache
def method_of(name: str, on_runs: Callable[[Config], Config], folder: Path) -> Method:
    """The data of a method, read once."""
    config = on_runs(of_few_rows(load(METHODS[name])))
    config = replace(config, per_device_train_batch_size=16, deepspeed=None, output_dir=str(folder / name))
    torch.manual_seed(0)
    data = build_data(config, ALONE, ("train",), None, None, lambda line: None)
    return Method(name, with_task_vectors(config, data, ALONE, None), data)


@pytest.fixture(params=METHODS)
def method(
    request: pytest.FixtureRequest, on_short_runs: Callable[[Config], Config], tmp_path_factory: Any
) -> Method:
    """Runs a test once a file."""
    return method_of(request.param, on_short_runs, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def on_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """(config, run_of) -> config: where it names what an earlier run has left, ./runs/<name>, the folder
    ``run_of(name)`` stands in."""

    def change(config: Config, run_of: Callable[[str], Path]) -> Config:
        def left(match: re.Match[str]) -> str:
            run, part = run_of(match[1]), match[2] or ""
            if part == "/loras" and not (run / "loras").exists():
                export_run(run, ALL, run / "loras", check=False)
            return str(checkpoint.find(run) if part.startswith("/checkpoint") else f"{run}{part}")

        text = dump(config)
        if NEEDED.search(text) is None:
            return config
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        path.write_text(NEEDED.sub(left, text), encoding="utf-8")
        return load(path)

    return change


@pytest.fixture(scope="session")
def on_short_runs(on_runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Config]:
    """With runs of three steps and few rows, each made once a session."""

    @cache
    def run_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("short") / name
        config = of_few_rows(load(METHODS[name]))
        groups = tuple(dict.fromkeys(group for phase in config.phases for group in phase.train))
        phases = (PhaseConfig(train=groups),)
        short = replace(config, phases=phases, max_steps=3, report_to=(), output_dir=str(folder))
        assert train(short) == 0
        return folder

    return lambda config: on_runs(config, run_of)


@cache
def table() -> dict[str, dict[str, str]]:
    """{file: {column: cell}} of the table "A file each" in docs/METHODS.md."""
    text = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")
    section = text.split("## A file each", 1)[1].split("\n## ", 1)[0].splitlines()
    places = [i for i, line in enumerate(section) if line.startswith("|")]
    header, _, *lines = section[places[0] : places[-1] + 1]
    assert len(lines) + 2 == len(places), "the table is cut in two"
    names = [cell.strip() for cell in header.strip("|").split("|")]
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        assert len(cells) == len(names), line
        row = dict(zip(names, cells, strict=True))
        file = row["file"].strip("`")
        assert file not in rows, f"{file} has two rows"
        rows[file] = row
    return rows


@pytest.fixture(scope="session")
def claims() -> dict[str, dict[str, str]]:
    """What docs/METHODS.md says of each file."""
    return table()


@pytest.fixture(scope="session")
def methods() -> list[str]:
    return list(METHODS)


@pytest.fixture(scope="session")
def shaken() -> Callable[..., TaskMoEModel]:
    """Shakes a model (see :func:`shake`)."""
    return shake


def shake(model: TaskMoEModel, seed: int = 1) -> TaskMoEModel:
    """Move every adapter tensor away from its start, which for many is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group, parameters in model.parameter_groups().items():
            for _, p in parameters if group != "base" else ():
                if p.is_floating_point():
                    p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 0.1)
    return model
