"""Models of ours that stand around a Hugging Face encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from taskmoe.moe.heads import MeanPoolClassifier
from taskmoe.moe.text_encoder import TextEncoder

HEAD = "head.safetensors"
WRAPPERS = (MeanPoolClassifier, TextEncoder)


def inside(base: nn.Module) -> tuple[nn.Module, str]:
    """The Hugging Face model itself, and what the names of its modules begin with in ``base``."""
    return (base.encoder, "encoder.") if isinstance(base, WRAPPERS) else (base, "")


def save_head(head: nn.Linear, labels: Sequence[str], folder: str | Path) -> None:
    """Write a linear on mean-pooled states, with the names of its outputs."""
    state = {name: p.detach().cpu().contiguous() for name, p in head.named_parameters()}
    about = {"pooling": "mean", "labels": json.dumps(list(labels), ensure_ascii=False)}
    save_file(state, Path(folder) / HEAD, metadata=about)


def load_head(folder: str | Path) -> tuple[nn.Linear, list[str]]:
    """What :func:`save_head` wrote: the linear and its labels."""
    with safe_open(str(Path(folder) / HEAD), "pt") as file:
        weight_NK, labels = file.get_tensor("weight"), json.loads(file.metadata()["labels"])
        bias = "bias" in file.keys()  # noqa: SIM118 (no mapping)
        linear = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=bias, dtype=weight_NK.dtype)
        linear.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return linear, labels
