"""The bed of ``conflict.py``: tasks of the skill gym whose gradients conflict by design, and one run on them.

A small Llama from a config learns the gym's skills one by one and is frozen: it stands for a pretrained base.
Then four new tasks are learned through one narrow LoRA that they share (or a routed bank). Only the first
token says which task a row belongs to, and its embedding is frozen too: ``visibility`` times a vector of its
own on top of one that all tasks share, so that tasks of low visibility look almost alike to the model.

Legend: T tasks, b rows of a task, L letters of a string (and of an answer).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, TaskMoEModel, attach
from taskmoe.train.balancing.balancer import Balancer
from taskmoe.train.config import SkillGymConfig
from taskmoe.train.data.skill_gym import ALPHABET, GymTask, SkillGym
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.task_gradients import TaskGradients

LENGTH = 6  # L: all strings are as long, so no row is padded
METHODS = ("pcgrad", "upgrad", "cagrad")
EVALUATIONS = 8  # along a run, the last at its end
GYM = SkillGymConfig(
    num_tasks=4,
    num_skills=10,
    alphabet_size=8,
    min_string_length=LENGTH,
    max_string_length=LENGTH,
    train_rows=600,
    validation_rows=60,
    test_rows=120,
)


@dataclass(frozen=True)
class Level:
    """How much the tasks disagree: the gym's settings, and how well the model can tell the tasks apart."""

    title: str
    visibility: float
    gym: Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """What makes a run long: steps, rows, width of the model."""

    steps: int = 200
    rows: int = 8  # of a task in a step
    width: int = 64
    base_steps: int = 500


@dataclass(frozen=True)
class Bed:
    """Tasks and rows of a level, as tokens: [first token, L letters, separator, L letters of the answer]."""

    level: Level
    tasks: list[GymTask]
    rows: dict[str, list[Tensor]]  # {split: [rows, 2 L + 2] int64 of each task}


def skill_tasks(gym: SkillGym) -> list[GymTask]:
    """Every skill as a task of its own: what the base learns."""
    return [GymTask(skill, (skill,), "") for skill in gym.skills]


def tokens(gym: SkillGym, task: GymTask, split: str, first: int) -> Tensor:
    """Rows of a task, [rows, 2 L + 2] int64."""
    rows = []
    for row in gym.rows(task, split):
        question, answer = str(row["prompt"]).removesuffix(" >").split(), str(row["target"]).split()
        letters = [[ALPHABET.index(c) for c in part] for part in (question, answer)]
        rows.append([first, *letters[0], gym.config.alphabet_size, *letters[1]])
    return torch.tensor(rows)


def build_bed(level: Level) -> Bed:
    """The rows do not depend on a run's seed: all arms and seeds learn the same tasks from them."""
    gym = SkillGym(replace(GYM, **level.gym))
    first = gym.config.alphabet_size + 1 + len(gym.skills)
    rows = {
        split: [tokens(gym, task, split, first + t) for t, task in enumerate(gym.tasks)]
        for split in ("train", "validation", "test")
    }
    return Bed(level, gym.tasks, rows)


def llama(size: Size) -> LlamaForCausalLM:
    """Letters, the separator, and a first token for each skill and each task."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=GYM.alphabet_size + 1 + GYM.num_skills + GYM.num_tasks,
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=2,
            **heads,
        )
    )


def build_base(size: Size, cache: Path | None = None) -> LlamaForCausalLM:
    """The Llama after learning the skills one by one; from the file ``cache`` where that exists."""
    model = llama(size)
    if cache is not None and cache.is_file():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model
    gym = SkillGym(replace(GYM, skills_per_task=1))
    first = gym.config.alphabet_size + 1
    rows = [tokens(gym, task, "train", first + t) for t, task in enumerate(skill_tasks(gym))]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for step in range(size.base_steps):
        _rate(optimizer, 3e-3, step, size.base_steps)
        loss_T, _ = losses(model, [some(part, size.rows, draw) for part in rows])
        optimizer.zero_grad()
        loss_T.mean().backward()
        optimizer.step()
    if cache is not None:
        torch.save(model.state_dict(), cache)
    return model


def build_model(bed: Bed, base: Mapping[str, Tensor], size: Size, kind: str, seed: int) -> TaskMoEModel:
    """The frozen base with one LoRA for all tasks (``lora``) or a routed bank (``bank``).

    The LoRA knows two task ids for each task, so that the halves of a batch can be told apart.
    """
    model = llama(size)
    model.load_state_dict(base)
    draw = torch.Generator().manual_seed(1)
    names = model.get_input_embeddings().weight
    spread = names[: GYM.alphabet_size].std()
    with torch.no_grad():
        own = torch.randn(len(bed.tasks) + 1, size.width, generator=draw)
        names[-len(bed.tasks) :] = spread * (own[0] + bed.level.visibility * own[1:])
    torch.manual_seed(seed)
    ids = [task.name for task in bed.tasks]
    if kind == "bank":
        return attach(model, TaskMoEConfig(r=2, num_experts=4, router_init_std=1.0), tasks=ids)
    settings = {"r": 2, "num_experts": 1, "router": "none", "gate": "uniform"}
    return attach(model, TaskMoEConfig.from_dict(settings), tasks=[*ids, *(f"{name}, again" for name in ids)])


def losses(model: nn.Module, rows: Sequence[Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    """The mean loss over letters [T], and which letters are right, bool [T, b, L].

    A row is answered right by greedy decoding exactly when all its letters are right here, where each letter
    is predicted from the right ones before it: the first wrong one ends both.
    """
    ids = torch.cat(list(rows))
    logits = model(input_ids=ids, **more).logits[:, LENGTH + 1 : -1]
    wanted = ids[:, LENGTH + 2 :]
    each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    right = (logits.argmax(-1) == wanted).view(len(rows), -1, LENGTH)
    return each.view(len(rows), -1).mean(1), right


def task_ids(tasks: int, rows: int) -> Tensor:
    return torch.arange(tasks).repeat_interleave(rows)


def score(model: TaskMoEModel, rows: Sequence[Tensor]) -> dict[str, list[float]]:
    """{"loss", "letters" (share of right letters), "exact" (share of right answers)}: a number a task."""
    model.eval()
    with torch.no_grad():
        loss_T, right = losses(model, rows, task_ids=task_ids(len(rows), len(rows[0])))
    model.train()
    shares = {"letters": right.float().mean((1, 2)), "exact": right.all(2).float().mean(1)}
    return {name: [round(v, 6) for v in value.tolist()] for name, value in {"loss": loss_T, **shares}.items()}


def train(
    bed: Bed,
    base: Mapping[str, Tensor],
    size: Size,
    *,
    kind: str = "lora",
    method: str = "sum",
    weights: Sequence[float] | None = None,
    rate: float = 1e-2,
    seed: int = 0,
    look: Callable[[TaskMoEModel, Bed, int], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """One run.

    Args:
        method: sum, static (with ``weights``, one a task), random, or one of surgery's methods.
        rate: learning rate at its peak (routers: ten times as fast).
        look: called at each evaluation; what it returns becomes ``gradients``.

    Returns:
        ``{"curve": [{"step", "cpu_seconds", "wall_seconds", "validation", "test"}], "gradients": [...]}``;
        the seconds are of training alone.
    """
    model = build_model(bed, base, size, kind, seed)
    speeds = {"experts": rate, "router": 10 * rate}
    groups = {g: [p for _, p in ps] for g, ps in model.trainable_groups().items() if ps}
    optimizers = {g: torch.optim.AdamW(ps, weight_decay=0.0) for g, ps in groups.items()}
    parameters = [p for ps in groups.values() for p in ps]
    T, draw = len(bed.tasks), torch.Generator().manual_seed(seed)
    surgery = Surgery(method, seed=seed) if method in METHODS else None
    grads = TaskGradients(model) if surgery is not None else None
    balancer = None
    if method in ("static", "random"):
        options = {"weights": list(weights or ())} if method == "static" else {}
        balancer = Balancer("fixed" if method == "static" else "random", T, options, seed)
    ids = task_ids(T, size.rows)
    marks = {size.steps * (i + 1) // EVALUATIONS for i in range(EVALUATIONS)}
    curve: list[dict[str, Any]] = []
    looks: list[dict[str, Any]] = []
    cpu = wall = 0.0
    for step in range(size.steps):
        begun = time.process_time(), time.perf_counter()
        for group, optimizer in optimizers.items():
            _rate(optimizer, speeds[group], step, size.steps)
            optimizer.zero_grad()
        rows = [some(part, size.rows, draw) for part in bed.rows["train"]]
        w_T = torch.ones(T) if balancer is None else balancer.weights(step).float()
        if grads is None or surgery is None:
            (losses(model, rows, task_ids=ids)[0] * w_T).mean().backward()
        else:
            with grads:
                losses(model, rows, task_ids=ids)[0].mean().backward()
            grads.combine(surgery, step)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        cpu, wall = cpu + time.process_time() - begun[0], wall + time.perf_counter() - begun[1]
        if step + 1 in marks:
            scores = {split: score(model, bed.rows[split]) for split in ("validation", "test")}
            seconds = {"cpu_seconds": round(cpu, 3), "wall_seconds": round(wall, 3)}
            curve.append({"step": step + 1, **seconds, **scores})
            if look is not None:
                looks += [{"step": step + 1, **found} for found in look(model, bed, step)]
    return {"curve": curve, **({"gradients": looks} if look is not None else {})}


def some(rows: Tensor, count: int, draw: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (count,), generator=draw)]


def _rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Up over the first twentieth of the steps, then linearly down to zero."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, 20 * (step + 1) / steps) * (1 - step / steps)


_RIVALS = {"skills_per_task": 1, "rivals": 2, "conflict": 0.5}
LEVELS: dict[str, Level] = {
    "opposed": Level("two skills, two tasks each; tasks hardly told apart", 0.1, _RIVALS),
    "apart": Level("the same tasks, well told apart", 1.0, _RIVALS),
    "same": Level("one task under four names", 1.0, {"skills_per_task": 2, "rivals": 4, "conflict": 0.0}),
}
