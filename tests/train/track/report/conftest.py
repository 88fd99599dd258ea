from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from taskmoe.moe import TaskTable
from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.track.facts import Facts

FAMILIES = ("caesar", "mirror", "rotate")
EVIL = '</script><img src="x" onerror="document.title=1"> & <b>$x$</b>'  # a task's name, which is any text


def table(num_tasks: int, evil: bool = True) -> TaskTable:
    """Tasks of three families, one after the other; the second one has a name that is a trap."""
    tasks = TaskTable()
    for t in range(num_tasks):
        family = FAMILIES[t % 3]
        tasks.add(EVIL if evil and t == 1 else f"{family} then {t}", group=family)
    return tasks


def gates(num_tasks: int, layers: int, experts: int, heads: int = 1, sharp: float = 3.0) -> dict[str, Any]:
    """{layer: [T, H, E]} of which the families share experts, more so in later layers; the last is dead."""
    found = {}
    for i in range(layers):
        logits_THE = torch.randn(num_tasks, heads, experts) * 0.6
        for t in range(num_tasks):
            logits_THE[t, :, (t % 3 + i) % (experts - 1)] += sharp * (i + 1) / layers
        logits_THE[:, :, -1] = -9.0
        found[f"model.layers.{i}.mlp"] = logits_THE.softmax(-1)
    return found


def log(tasks: TaskTable, steps: int, every: int = 10) -> list[dict[str, Any]]:
    """Lines of a run with surgery whose tasks learn at different speeds."""
    lines: list[dict[str, Any]] = []
    slugs = [task.slug for task in tasks]
    for step in range(every, steps + 1, every):
        done = step / steps
        losses = {s: 3 * math.exp(-(1 + t % 4) * done) for t, s in enumerate(slugs)}
        line: dict[str, Any] = {
            "step": step,
            "kind": "train",
            "train/loss": sum(losses.values()) / len(losses),
        }
        for t, s in enumerate(slugs):
            line[f"train/loss/{s}"] = losses[s]
            line[f"train/tokens/{s}"] = 1000 * step
            line[f"train/epochs/{s}"] = done * (1 + t)
            line[f"weight/{s}"] = 1 / len(slugs)
        for key in ("over_uniform", "between_tasks", "drift"):
            line[f"routing/{key}"] = 0.6 * done
        line |= {"routing/effective_experts": 6 - 3 * done, "routing/dead_expert_frac": 0.125}
        line |= {"grad/conflict_frac": 0.4 - 0.2 * done, "grad/cosine": 0.1, "grad/same_task_cosine": 0.5}
        lines.append(line)
        if step * 2 % steps == 0:
            scores = {f"eval/{s}/exact_match": done * (0.5 + 0.04 * (t % 12)) for t, s in enumerate(slugs)}
            names = {f"eval/{s}/metric": "exact_match" for s in slugs}
            lines.append({"step": step, "kind": "eval", "eval/score": 0.7 * done, **scores, **names})
    return lines


def conflict(tasks: TaskTable) -> tuple[list[list[str]], list[list[float]]]:
    """Tasks of a family agree, others do not; the last row had no gradient."""
    rows = [[task.slug] for task in tasks]
    C_RR = [[0.6 if a % 3 == b % 3 else -0.3 for b in range(len(rows))] for a in range(len(rows))]
    for i in range(len(rows)):
        C_RR[i][i] = 1.0
        C_RR[i][-1] = C_RR[-1][i] = math.nan
    return rows, C_RR


def results(tasks: TaskTable) -> dict[str, Any]:
    """eval_results.json with all arms."""
    arms = {}
    for arm, level in (("experts", 0.9), ("disabled", 0.1), ("uniform", 0.4)):
        scored = {t.name: {"metric": "exact_match", "exact_match": level, "loss": 1 - level} for t in tasks}
        arms[arm] = {"tasks": scored, "macro": {}, "groups": {}, "score": level}
    return {"step": 100, "best": None, **arms}


@pytest.fixture
def make_facts() -> Callable[..., Facts]:
    """Facts of a run with everything there is to show; what is given as None is not there."""

    def make(num_tasks: int = 12, layers: int = 3, experts: int = 8, heads: int = 1, **other: Any) -> Facts:
        tasks = other.pop("tasks", None) or table(num_tasks)
        first = {
            n: torch.full_like(g, 1 / experts) for n, g in gates(num_tasks, layers, experts, heads).items()
        }
        moe: Mapping[str, Any] = {"bank": "low_rank", "router": "task_table", "gate": "softmax"}
        facts: dict[str, Any] = {
            "source": Path("runs/families"),
            "kind": "run",
            "step": 100,
            "config": {"run_name": "families", "moe": moe, "model_name_or_path": "tiny"},
            "tasks": tasks,
            "snapshot": Snapshot("task", gates(num_tasks, layers, experts, heads)),
            "first": Snapshot("task", first),
            "log": log(tasks, 100),
            "results": results(tasks),
            "conflict": conflict(tasks),
        }
        return Facts(**(facts | other))

    return make
