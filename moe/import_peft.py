"""LoRAs of peft as one model: each a task of its own, or mixed by any router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from taskmoe.moe.attach import attach
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.tasks import TaskTable


def import_peft(
    model: nn.Module,
    folders: Sequence[str | Path],
    config: TaskMoEConfig | None = None,
    tasks: TaskTable | Sequence[str] | int | None = None,
    *,
    train: bool = False,
    **kwargs: Any,
) -> TaskMoEModel:
    """Attach saved LoRAs to ``model``, the base model that they were trained on, as frozen experts.

    Args:
        folders: what peft's ``save_pretrained`` wrote, one an expert.
        config: router and gate; bank, rank and targets come from the folders. None: each task has one expert.
        tasks: as for :func:`attach`; None: one a folder, named after it.
        train: whether the experts go on training.

    Raises:
        ConfigError: a folder that cannot be used, or that belongs to another model.
    """
    names = [Path(folder).name for folder in folders]
    if config is None:
        known = names if tasks is None or isinstance(tasks, int) else getattr(tasks, "names", tasks)
        experts = {name: e for e, name in enumerate(names)}
        options = {"experts": {n: e for n, e in experts.items() if n in known} or experts}
        config = TaskMoEConfig(router="fixed", gate="raw", router_options=options)
    config = replace(
        config,
        bank="imported",
        bank_options={"adapters": tuple(str(folder) for folder in folders), "train": train},
        num_experts=max(1, len(folders)),
    )
    return attach(model, config, names if tasks is None else tasks, **kwargs)
