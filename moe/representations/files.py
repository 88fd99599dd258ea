"""Vectors of tasks as files: safetensors or JSON, {task name: vector}.

Legend: D task vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taskmoe.moe.config import ConfigError

FILE = "task_vectors.safetensors"  # the name beside an adapter
KEY = "moe.representation_options.path"


def read_vectors(path: str | Path) -> dict[str, Tensor]:
    """{task name: [D] float32} of a .safetensors or .json file.

    Raises:
        ConfigError: it cannot be read, or its vectors are not finite, not flat, or not of one size.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            found = {str(n): torch.tensor(v, dtype=torch.float32, device="cpu") for n, v in rows.items()}
        else:
            found = {n: v.float() for n, v in load_file(path, device="cpu").items()}
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{KEY}: {path}: no readable .safetensors or .json file ({error})") from error
    sizes = {tuple(v.shape) for v in found.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1 or not next(iter(sizes))[0]:
        raise ConfigError(
            f"{KEY}: {path}: has shapes {sorted(sizes)}; give each task a list of numbers, all as long"
        )
    for name, vector in found.items():
        if not vector.isfinite().all():
            raise ConfigError(f"{KEY}: {path}: the vector of {name!r} is not finite")
    return found


def write_vectors(vectors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write {task name: [D]} as a .safetensors file; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({n: v.detach().float().cpu().contiguous() for n, v in vectors.items()}, part)
    part.replace(path)
