"""From settings to a model with experts and its data: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from taskmoe.moe import StateError, TaskMoEModel, TaskTable, attach, attach_heads
from taskmoe.moe.text_encoder import TextEncoder
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import DataBundle, read_tasks, tokenise
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.packing import FLAT_ATTENTION, require_packing
from taskmoe.train.distributed import Ranks
from taskmoe.train.instances import with_instances
from taskmoe.train.models import LOAD_ERRORS, build_model, build_tokenizer
from taskmoe.train.together import main_first


@dataclass(frozen=True)
class Data:
    """Tokenizer, tokenised tasks, and how rows become batches."""

    tokenizer: PreTrainedTokenizerBase
    bundle: DataBundle
    collator: Collator


def build_data(
    config: Config,
    ranks: Ranks,
    splits: Sequence[str],
    tasks: TaskTable | None,
    tokenizer_folder: Path | None,
    say: Callable[[str], None],
    append: bool = False,
) -> Data:
    """Read and tokenise; rank 0 first, so that the others find its cache. One rank's error is raised on all.

    Args:
        tasks: the table of a checkpoint, which the data may extend; None for a new run.
        tokenizer_folder: a saved tokenizer; None: a new one, trained on the training texts where the model
            is built from a config.
        append: tasks that the table lacks stand behind it, whatever the data begin with.
    """

    def read() -> tuple[PreTrainedTokenizerBase, DataBundle]:
        raw = read_tasks(config, splits, tasks, say=say, append=append)
        if tokenizer_folder is None:
            tokenizer = build_tokenizer(config, raw.texts())
        else:
            tokenizer = saved_tokenizer(tokenizer_folder)
        return tokenizer, tokenise(raw, tokenizer, config, say=say)

    tokenizer, bundle = main_first(ranks, read)
    labels = [len(t.labels or ()) for t in bundle.tasks]
    packing = config.data.packing
    collator = Collator(
        tokenizer,
        config.task_type,
        len(bundle.tasks),
        labels,
        packing,
        config.data.max_length if packing else None,
        flat=config.attn_implementation in FLAT_ATTENTION,
    )
    return Data(tokenizer, with_instances(bundle, config), collator)


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Raises:
        StateError: it is not there, or not readable.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except LOAD_ERRORS as error:
        raise StateError(f"{folder}: not a readable tokenizer; put back what the run saved there") from error


def build_moe(
    config: Config, tokenizer: PreTrainedTokenizerBase, tasks: TaskTable, ranks: Ranks
) -> TaskMoEModel:
    """The base model with heads, banks and routers; the same on every rank (seeded by ``config.seed``)."""
    base: Any = build_model(config, tokenizer, tasks)
    if config.data.packing:
        require_packing(base, config)
    torch.manual_seed(config.seed)
    if config.task_type == "SEQ_CLS":
        base = attach_heads(base, tasks, config.pooling)
    if config.task_type == "FEATURE_EXTRACTION":
        cosine, scale = config.contrastive.similarity == "cosine", config.contrastive.temperature**-0.5
        base = TextEncoder(base, config.pooling, cosine, scale)
    model = attach(base.to(ranks.device), config.moe, tasks)
    model.to(ranks.device)
    if config.gradient_checkpointing:
        name = "activation_checkpointing_enable"  # what newer transformers call it
        enable = getattr(base, name) if hasattr(base, name) else base.gradient_checkpointing_enable
        enable({"use_reentrant": config.gradient_checkpointing_reentrant})
    return model
