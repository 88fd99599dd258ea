"""The model of a run with one LoRA for all tasks in place of its experts: what is scored, and saved as a run.

Legend: R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe import TaskMoEConfig, TaskMoEModel
from taskmoe.moe.collapse import Pair, expert_linears
from taskmoe.moe.merging.base import Source
from taskmoe.moe.state import save_adapter
from taskmoe.moe.targets import features
from taskmoe.moe.wrappers import inside
from taskmoe.train import checkpoint
from taskmoe.train.config import Config, PhaseConfig
from taskmoe.train.config_io import dump
from taskmoe.train.data.bundle import to_stderr
from taskmoe.train.evaluate import evaluate
from taskmoe.train.merging.sources import MergeError
from taskmoe.train.run_folder import CONFIG, TASKS, TOKENIZER
from taskmoe.train.setup import build_data, build_moe
from taskmoe.train.trained_run import ALONE, TrainedRun
from taskmoe.train.weights import base_state, save_base

# What of a run's settings says which model and rows it has, and how these are scored.
KEPT = ("model_name_or_path", "model", "tokenizer", "task_type", "pooling", "contrastive",
        "attn_implementation", "trust_remote_code", "data", "seed", "per_device_eval_batch_size",
        "eval_split", "evaluation")  # fmt: skip
ASIDE = ("base", "original")  # what a linear with experts, and a saved module, call what was there before


def require_linears(trained: TrainedRun, pairs: Source) -> None:
    """Raises MergeError where the model of a run lacks a linear of ``pairs``, or has one of another size."""
    modules = dict(inside(trained.model.base_model)[0].named_modules())
    for name, (A_RK, B_RN) in pairs.items():
        module: Any = modules.get(name)
        own = None if module is None else features(getattr(module, "base", module))
        if own != (A_RK.shape[1], B_RN.shape[1]):
            there = "no linear" if own is None else f"{own[0]} x {own[1]}"
            raise MergeError(
                f"{name} of the LoRAs, {A_RK.shape[1]} x {B_RN.shape[1]}, is {there} in the model of "
                f"{trained.home}; they belong to another"
            )


class MergedModel:
    """The base, heads and tasks of ``trained``, and pairs, {linear of the Hugging Face model: A, B}."""

    def __init__(self, trained: TrainedRun, pairs: Source) -> None:
        prefix = inside(trained.model.base_model)[1]
        self.trained, self.pairs = trained, {prefix + name: pair for name, pair in pairs.items()}
        self.config = _config(trained, self.pairs)
        self.model = build_moe(self.config, trained.tokenizer, trained.model.tasks, ALONE).eval()
        self.linears = expert_linears(self.model)[0]
        _copy_rest(trained.model, self.model)
        self.use(1.0)

    @torch.no_grad()
    def use(self, coefficient: float) -> None:
        """The LoRA, multiplied by this, from now on."""
        for name, linear in self.linears.items():
            bank: Any = linear.bank
            A_RK, B_RN = self.pairs[name]
            bank.A_ErK.copy_(A_RK[None])
            bank.B_ErN.copy_(coefficient * B_RN[None])

    def save_run(self, folder: Path, target: Path) -> None:
        """Write a run of no steps, as ``taskmoe eval``, ``inspect`` and ``export`` read it; target: the place
        that it goes to."""
        config = replace(self.config, output_dir=str(target), run_name=target.name)
        (folder / CONFIG).write_text(dump(config), encoding="utf-8")
        self.model.tasks.save(folder / TASKS)
        self.trained.tokenizer.save_pretrained(folder / TOKENIZER)

        def write(path: Path) -> None:
            save_adapter(self.model, path)
            if self.trained.has_own_base:
                save_base(base_state(self.model), path)

        checkpoint.save(folder, 0, write, {}, 0, set(), ALONE)


class Scorer:
    """Scores of a merged model on the rows of a split of its run.

    Raises:
        ConfigError, DataError: the run's data cannot be read.
    """

    def __init__(self, merged: MergedModel, split: str) -> None:
        self.merged, self.split = merged, split
        trained = merged.trained
        tasks = trained.model.tasks
        self.data = build_data(merged.config, ALONE, (split,), tasks, trained.home / TOKENIZER, to_stderr)

    def rows(self, task: str) -> int:
        """How many rows a task has in the split."""
        number = self.merged.model.tasks.id(task)
        return sum(len(s.tokens) for s in self.data.bundle.splits[self.split] if s.task == number)

    def of(self, coefficient: float, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """What :func:`taskmoe.train.evaluate.evaluate` says of these tasks, or of all.

        Raises:
            ConfigError: none of them has rows. TaskError: an unknown task.
        """
        merged = self.merged
        ids = None if tasks is None else [merged.model.tasks.id(task) for task in tasks]
        merged.use(coefficient)
        data, splits = self.data, self.data.bundle.splits[self.split]
        return evaluate(merged.model, splits, data.tokenizer, merged.config, data.collator, ALONE, ids)


def _config(trained: TrainedRun, pairs: dict[str, Pair]) -> Config:
    """Of a run that does no step, with one expert for all tasks."""
    ranks = {name: len(pair.A_RK) for name, pair in pairs.items()}
    r = max(ranks.values())
    moe = TaskMoEConfig(
        r=r,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r} or None,
        num_experts=1,
        router="none",
        gate="uniform",
        target_modules=tuple(pairs),
        modules_to_save=trained.config.moe.modules_to_save,
    )
    config = trained.config
    kept = {key: getattr(config, key) for key in KEPT}
    # Weights in a mixture have no effect where nothing is mixed.
    datasets = tuple(replace(entry, weight=type(entry)().weight) for entry in config.datasets)
    phases = (PhaseConfig(train=("experts",)),)
    return Config(**kept, datasets=datasets, moe=moe, max_steps=0, phases=phases, report_to=())


@torch.no_grad()
def _copy_rest(source: TaskMoEModel, target: TaskMoEModel) -> None:
    """Base, heads and saved modules as ``source`` has them, whichever linears have experts in it."""
    theirs, own = _rest(source), _rest(target)
    assert theirs.keys() == own.keys()
    for name, tensor in own.items():
        tensor.copy_(theirs[name])


def _rest(model: TaskMoEModel) -> dict[str, Tensor]:
    groups = model.parameter_groups()
    found = {n: p.data for group in ("base", "heads", "saved") for n, p in groups[group]}
    kept = model.state_dict().keys() - model.adapter_tensors().keys()
    found |= {n: b for n, b in model.named_buffers() if n in kept}
    return {".".join(part for part in name.split(".") if part not in ASIDE): t for name, t in found.items()}
