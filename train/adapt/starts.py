"""Where new tasks start: at the known task that serves them best, or at the one that is like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import AutoConfig

from taskmoe.moe import ConfigError, TaskMoEModel, TaskTable
from taskmoe.moe.new_tasks import has_rows, start_from
from taskmoe.train.adapt.settings import AdaptError
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import TaskSplit, read_tasks
from taskmoe.train.data.collator import Collator
from taskmoe.train.instances import HASHED, InstanceEncoder
from taskmoe.train.models import LOAD_ERRORS
from taskmoe.train.nearest import loss_as
from taskmoe.train.retrieval import InstanceIndex

HASHED_CELLS = 512


def require_rows(model: TaskMoEModel, mode: str) -> None:
    """Raises AdaptError where nothing belongs to a task, so that one cannot start from another."""
    if not has_rows(model):
        raise AdaptError(
            f"--mode {mode}: moe.router {model.moe_config.router!r} and moe.bank {model.moe_config.bank!r} "
            "have nothing that belongs to one task, so a new one is no other than the rest; use zero, "
            "router+experts, mean or new_lora"
        )


@torch.no_grad()
def least_loss(
    model: TaskMoEModel,
    splits: Mapping[int, TaskSplit],
    rows: Mapping[int, Sequence[int]],
    known: int,
    collate: Collator,
    config: Config,
) -> dict[int, int]:
    """{new task: the known one under whose routes its rows have the least mean loss}.

    Of classifiers with heads, among the known tasks with the same labels: other heads know other answers.

    Raises:
        AdaptError: no known task has the labels of a new one.
    """
    found = {}
    for task, own in rows.items():
        labels = model.tasks[task].labels
        heads = config.task_type == "SEQ_CLS"
        among = [t for t in range(known) if not heads or model.tasks[t].labels == labels]
        if not among:
            raise AdaptError(
                f"nearest: no task of the run has the labels {', '.join(labels or ())} of "
                f"{model.tasks.names[task]!r}, whose losses could be compared; use retrieve"
            )
        size = config.per_device_eval_batch_size
        chunks = [own[i : i + size] for i in range(0, len(own), size)]
        totals = dict.fromkeys(among, 0.0)
        for chunk in chunks:
            batch = collate([{**splits[task].tokens[i], "task": task} for i in chunk])
            for t in among:
                totals[t] += loss_as(model, batch, t, config) * len(chunk)
        found[task] = min(among, key=lambda t: totals[t])
    return found


class Retriever:
    """Which known task is like given texts: the nearest of its training prompts (ELM's retrieval).

    Args:
        config: of the run, with its own data; encoder: ``hashed_words``, or an encoder by path or name.

    Raises:
        ConfigError, DataError: the run's data cannot be read again, or the encoder.
    """

    def __init__(self, config: Config, tasks: TaskTable, encoder: str = HASHED) -> None:
        raw = read_tasks(config, ("train",), tasks, say=lambda line: None)
        texts = {
            task.name: [row["prompt"] for row in rows]
            for task, rows in zip(tasks, raw.splits["train"], strict=True)
            if rows
        }
        self.embed = InstanceEncoder(encoder, _size(encoder))
        self.index = InstanceIndex.build(texts, self.embed, seed=config.seed)

    def __call__(self, texts: Sequence[str]) -> str:
        """The name of the task that most of ``texts`` are nearest to."""
        return self.index.retrieve(self.embed(texts))[0]


def _size(encoder: str) -> int:
    if encoder == HASHED:
        return HASHED_CELLS
    try:
        return int(AutoConfig.from_pretrained(encoder).hidden_size)
    except LOAD_ERRORS as error:
        raise ConfigError(f"encoder: {encoder!r} is not {HASHED}, and no encoder ({error})") from error


def start_as(model: TaskMoEModel, found: Mapping[int, int]) -> dict[int, str]:
    """Give each new task what belongs to the known one; {new task: name of the known one}."""
    names = model.tasks.names
    start_from(model, {names[new]: names[seen] for new, seen in found.items()})
    return {new: names[seen] for new, seen in found.items()}
