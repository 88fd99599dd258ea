"""What is merged: LoRAs of runs and of folders that peft wrote, all of one base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.merging.base import Source
from taskmoe.moe.merging.sources import of_experts, of_tasks
from taskmoe.moe.peft_files import read_lora
from taskmoe.moe.peft_write import CONFIG
from taskmoe.moe.wrappers import inside
from taskmoe.train.folders import nearest_folder
from taskmoe.train.trained_run import TrainedRun, load_run

TASKS, EXPERTS = "tasks", "experts"


class MergeError(ValueError):
    """What cannot be merged, or not like that."""


@dataclass(frozen=True)
class Gathered:
    """loras: {name: LoRA}, its linears named as in the Hugging Face model. runs: those that they, or the
    tasks to choose by, are from. tasks: the merged ones of runs. about_base: what an adapter says of its
    base, where no run does."""

    loras: dict[str, Source]
    runs: list[TrainedRun]
    tasks: list[str]
    about_base: dict[str, Any] | None


def gather(
    paths: Sequence[str], over: str = TASKS, tasks: Sequence[str] | None = None, run: str | None = None
) -> Gathered:
    """Read all LoRAs.

    Args:
        paths: runs, checkpoints, folders that peft wrote, or folders of such folders.
        over: what of a run is merged: what each of its tasks uses, or each of its experts.
        tasks: these of the runs' tasks alone.
        run: one that has the base, and the data to choose by, where no run is merged.

    Raises:
        MergeError: not such a folder, LoRAs of different bases, or modules that were trained whole beside.
        CollapseError: a run without LoRAs. TaskError: an unknown task; names the nearest.
        ConfigError, CheckpointError, StateError: as :func:`taskmoe.train.trained_run.load_run`, or an adapter
        that is more than A and B.
    """
    loras: dict[str, Source] = {}
    runs, merged_tasks, bases = [], [], []
    about_base = None
    for path in [found for given in paths for found in _adapters(Path(given)) or [Path(given)]]:
        of_path: dict[str, Source]
        if _is_adapter(path):
            lora = read_lora(path, "merge")
            of_path = {path.name: {n: Pair(A.float(), B.float()) for n, (A, B) in lora.factors.items()}}
            about_base = about_base or _about_base(path)
            bases.append(_base_of_adapter(path))
        else:
            trained = load_run(path)
            of_path = _of_run(trained, over, tasks)
            merged_tasks += list(of_path) if over == TASKS else []
            runs.append(trained)
            bases.append(_base_of_run(trained))
        for name, pairs in of_path.items():
            loras[name if name not in loras else f"{path}: {name}"] = pairs
    if run is not None:
        known = [r for r in runs if Path(run).resolve() in (r.home.resolve(), r.checkpoint.resolve())]
        runs.insert(0, known[0] if known else load_run(run))
        bases += [] if known else [_base_of_run(runs[0])]
    for base in bases[1:]:
        _require_same(bases[0], base)
    _require_no_whole_modules(runs, alone=len(bases) == 1)
    return Gathered(loras, runs, list(dict.fromkeys(merged_tasks)), about_base)


def _is_adapter(path: Path) -> bool:
    """Whether peft wrote it; an adapter of a checkpoint is of another type."""
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8")).get("peft_type") != "TASKMOE"
    except (OSError, ValueError, AttributeError):
        return False


def _adapters(path: Path) -> list[Path]:
    """Peft's folders in a folder that is neither one itself nor a run.

    Raises:
        MergeError: there is no folder.
    """
    if not path.is_dir():
        raise MergeError(f"{path}: no such folder{nearest_folder(path)}")
    if (path / CONFIG).exists() or (path / "config.yaml").exists():
        return []
    return sorted(p.parent for p in path.glob(f"*/{CONFIG}") if _is_adapter(p.parent))


def _of_run(trained: TrainedRun, over: str, tasks: Sequence[str] | None) -> dict[str, Source]:
    prefix = inside(trained.model.base_model)[1]
    found = of_experts(trained.model) if over == EXPERTS else of_tasks(trained.model, tasks)
    return {n: {x.removeprefix(prefix): p for x, p in source.items()} for n, source in found.items()}


@dataclass(frozen=True)
class _Base:
    """where: who has it. name: on the hub, or a folder; None: it has none. weights: read only if need be."""

    where: str
    name: str | None
    weights: Callable[[], Mapping[str, Tensor]]


def _base_of_run(trained: TrainedRun) -> _Base:
    name = None if trained.has_own_base else trained.config.model_name_or_path
    return _Base(str(trained.home), name, lambda: trained.plain_base().state_dict())


def _base_of_adapter(folder: Path) -> _Base:
    name = _about_base(folder)["base_model_name_or_path"]

    def weights() -> dict[str, Tensor]:
        files = sorted(Path(name).glob("*.safetensors")) if name else []
        return {key: tensor for file in files for key, tensor in load_file(file).items()}

    return _Base(str(folder), name, weights)


def _about_base(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return {key: config.get(key) for key in ("task_type", "base_model_name_or_path", "fan_in_fan_out")}


def _require_same(first: _Base, other: _Base) -> None:
    """By name, or else weight by weight: the sum of two updates means something on one base alone.

    Raises:
        MergeError: they differ, or cannot be compared.
    """
    if first.name is not None and first.name == other.name:
        return
    one, two = first.weights(), other.weights()
    shared = one.keys() & two.keys()  # a file has tied weights once
    if not shared or any(one[n].shape != two[n].shape or not torch.equal(one[n], two[n]) for n in shared):
        raise MergeError(
            f"{other.where} was not trained on the base of {first.where} ({other.name or 'its own'} and "
            f"{first.name or 'its own'}): LoRAs are merged on one base; train them with the same "
            "model_name_or_path, and without the group base"
        )


def _require_no_whole_modules(runs: Sequence[TrainedRun], alone: bool) -> None:
    for trained in [] if alone else runs:
        for name, module in trained.model.base_model.named_modules():
            if isinstance(module, SavedModule):
                raise MergeError(
                    f"{trained.home}: {name} was trained whole (moe.modules_to_save), and only LoRAs can be "
                    "merged with those of others"
                )
