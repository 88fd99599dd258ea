"""The base of an earlier run as that run left it: ``model_name_or_path`` may name the folder of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from taskmoe.train import checkpoint
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_io import load
from taskmoe.train.run_folder import CONFIG, TOKENIZER
from taskmoe.train.weights import BASE_WEIGHTS

KEY = "model_name_or_path"
ASIDE = ("base", "original")  # what stands beside experts goes by these names


@dataclass(frozen=True)
class EarlierRun:
    """A run folder, and the checkpoint in it that is meant."""

    folder: Path
    checkpoint: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    def config(self) -> Config:
        """The settings of the run; its DeepSpeed file may be gone."""
        return load(self.folder / CONFIG, ["--deepspeed=null"])

    @torch.no_grad()
    def load_base(self, model: nn.Module, new_head: bool = False) -> None:
        """Copy what the run made of its base into ``model``, which is built as that base was.

        Nothing is copied where the run saved no base: it had one of the hub, and did not train it.

        Args:
            new_head: what stands outside ``model.base_model`` may be missing: tasks have heads of their own
                in its place.

        Raises:
            ConfigError: unreadable, or the base of another kind of model.
        """
        path = self.checkpoint / BASE_WEIGHTS
        if not path.exists():
            return
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{KEY}: {path}: not a readable safetensors file ({error})") from error
        own = {n: p.data for n, p in model.named_parameters()}
        missing = set(own)
        own.update({n: b for n, b in model.named_buffers() if n in model.state_dict()})
        for saved, value in state.items():
            name = _plain(saved, own)
            if name is None or own[name].shape != value.shape:
                raise ConfigError(
                    f"{KEY}: {saved} of {path} does not fit {type(model).__name__}; use the task_type and "
                    "pooling of that run"
                )
            own[name].copy_(value)
            missing.discard(name)
        if new_head:
            inner = {id(p) for p in model.base_model.parameters()}  # type: ignore[union-attr]
            missing = {n for n, p in model.named_parameters() if n in missing and id(p) in inner}
        if missing:
            raise ConfigError(
                f"{KEY}: {path} lacks {min(missing)} of {type(model).__name__}; another task_type?"
            )


def earlier_run(name: str | None) -> EarlierRun | None:
    """The run that a folder belongs to: its own, or that of one of its checkpoints. None: no folder of a run.

    Raises:
        ConfigError: the run has no whole checkpoint.
    """
    path = Path(name).expanduser() if name else None
    if path is None or not path.is_dir() or (path / "config.json").exists():
        return None
    home = path if (path / CONFIG).is_file() else path.parent
    if not (home / CONFIG).is_file() or not (home / TOKENIZER).is_dir():
        return None
    try:
        return EarlierRun(home, checkpoint.find(path))
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"{KEY}: {str(error).partition(': ')[2]}") from error


def _plain(name: str, own: dict[str, Tensor]) -> str | None:
    """The name in a model without experts of a tensor that was saved with them around it."""
    whole = name.split(".")
    for parts in (whole, [p for p in whole if p not in ASIDE]):
        for i in range(len(parts)):  # wrappers put their own names before
            if (found := ".".join(parts[i:])) in own:
                return found
    return None
