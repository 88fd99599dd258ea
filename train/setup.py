"""From settings to a model with experts and its data: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from taskmoe.moe import TaskMoEModel, TaskTable, attach, attach_heads
from taskmoe.moe.state import StateError
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import DataBundle, read_tasks, tokenise
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.packing import FLAT_ATTENTION, require_packing
from taskmoe.train.distributed import Ranks
from taskmoe.train.models import LOAD_ERRORS, build_model, build_tokenizer
from taskmoe.train.together import main_first

BASE_WEIGHTS = "base_model.safetensors"  # in a checkpoint, where the base is not a model of the hub


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
) -> Data:
    """Read and tokenise; rank 0 first, so that the others find its cache. An error of one rank is raised on all.

    Args:
        tasks: the table of a checkpoint, which the data may extend; None for a new run.
        tokenizer_folder: a saved tokenizer to use; None: built, and trained on the training texts where the model is.
    """
    def read() -> tuple[PreTrainedTokenizerBase, DataBundle]:
        raw = read_tasks(config, splits, tasks, say=say)
        tokenizer = build_tokenizer(config, raw.texts()) if tokenizer_folder is None else saved_tokenizer(tokenizer_folder)
        return tokenizer, tokenise(raw, tokenizer, config, say=say)

    tokenizer, bundle = main_first(ranks, read)
    labels = [len(t.labels or ()) for t in bundle.tasks]
    packing = config.data.packing
    collator = Collator(
        tokenizer, config.task_type, len(bundle.tasks), labels, packing, config.data.max_length if packing else None,
        flat=config.attn_implementation in FLAT_ATTENTION,
    )  # fmt: skip
    return Data(tokenizer, bundle, collator)


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Raises:
        StateError: it is not there, or not readable.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except LOAD_ERRORS as error:
        raise StateError(f"{folder}: not a readable tokenizer; put back what the run saved there") from error


def build_moe(config: Config, tokenizer: PreTrainedTokenizerBase, tasks: TaskTable, ranks: Ranks) -> TaskMoEModel:
    """The base model with heads, banks and routers; the same on every rank (seeded by ``config.seed``)."""
    base = build_model(config, tokenizer, tasks)
    if config.data.packing:
        require_packing(base, config)
    torch.manual_seed(config.seed)
    if config.task_type == "SEQ_CLS":
        base = attach_heads(base, tasks, config.pooling)
    model = attach(base.to(ranks.device), config.moe, tasks)
    model.to(ranks.device)
    if config.gradient_checkpointing:
        kwargs = {"use_reentrant": config.gradient_checkpointing_reentrant}
        model.base_model.gradient_checkpointing_enable(kwargs)  # type: ignore[operator,union-attr]
    return model


def base_state(model: TaskMoEModel) -> dict[str, Tensor]:
    """The base model's parameters (tied ones once) and persistent buffers, on the CPU."""
    state = {n: p.detach().cpu().contiguous() for n, p in model.parameter_groups()["base"]}
    kept = set(model.state_dict().keys())
    state.update({n: b.detach().cpu().contiguous() for n, b in model.named_buffers() if n in kept})
    return state


def save_base(state: dict[str, Tensor], folder: Path) -> None:
    """Write :func:`base_state`."""
    save_file(state, folder / BASE_WEIGHTS, metadata={"format": "pt"})


def load_base(model: TaskMoEModel, folder: Path) -> None:
    """Load what :func:`save_base` wrote, where the folder has it.

    Raises:
        StateError: unreadable, or tensors that do not fit.
    """
    path = folder / BASE_WEIGHTS
    if not path.exists():
        return
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: not a readable safetensors file ({error})") from error
    load_base_state(model, state, str(path))


def load_base_state(model: TaskMoEModel, state: dict[str, Tensor], source: str) -> None:
    """Copy :func:`base_state` into a model of the same settings.

    Raises:
        StateError: a tensor is missing or has another shape.
    """
    own = {n: p.data for n, p in model.parameter_groups()["base"]}
    own.update(dict(model.named_buffers()))
    wrong = [n for n, t in state.items() if n not in own or own[n].shape != t.shape]
    missing = [n for n, _ in model.parameter_groups()["base"] if n not in state]
    if wrong or missing:
        raise StateError(f"{source}: {(wrong + missing)[0]} does not fit the model; were model settings changed?")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
