"""A finished run as a model, without its data: what export, merging and adaptation begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taskmoe.moe import TaskMoEModel, TaskTable, load_adapter
from taskmoe.moe.state import read_config, with_saved_vectors
from taskmoe.train import checkpoint
from taskmoe.train.config import Config, ConfigError
from taskmoe.train.config_io import load
from taskmoe.train.distributed import Ranks
from taskmoe.train.earlier_run import EarlierRun, earlier_run
from taskmoe.train.folders import nearest_folder
from taskmoe.train.models import build_model
from taskmoe.train.run_folder import CONFIG, TASKS, TOKENIZER
from taskmoe.train.setup import build_moe, saved_tokenizer
from taskmoe.train.weights import BASE_WEIGHTS, load_base

ALONE = Ranks(0, 1, 0, torch.device("cpu"), owns_group=False)


@dataclass(frozen=True)
class TrainedRun:
    """home: the run folder; checkpoint: the folder in it that was read; config: its settings, those of
    ``moe`` as the checkpoint has them; model: in evaluation mode, in float32 on the CPU."""

    home: Path
    checkpoint: Path
    config: Config
    tokenizer: PreTrainedTokenizerBase
    model: TaskMoEModel

    @property
    def has_own_base(self) -> bool:
        """See :func:`has_own_base`."""
        return has_own_base(self.config, self.checkpoint)

    def plain_base(self) -> PreTrainedModel:
        """The Hugging Face model under the experts as the run left it, without heads: a new one.

        Raises:
            ConfigError: it cannot be built.
        """
        base = build_model(self.config, self.tokenizer, self.model.tasks)
        plain: Any = base.base_model if self.config.task_type == "SEQ_CLS" else base
        EarlierRun(self.home, self.checkpoint).load_base(plain)
        return plain


def has_own_base(config: Config, path: Path) -> bool:
    """Whether the base of a run, of which ``path`` is a checkpoint, was trained, built from settings, or an
    earlier run's: no hub has it."""
    return earlier_run(config.model_name_or_path) is not None or (path / BASE_WEIGHTS).is_file()


@dataclass(frozen=True)
class OpenRun:
    """A run before its model is built: what can be read at once. Fields as in :class:`TrainedRun`."""

    home: Path
    checkpoint: Path
    config: Config
    tokenizer: PreTrainedTokenizerBase
    tasks: TaskTable

    def load(self, tasks: TaskTable | None = None, config: Config | None = None) -> TrainedRun:
        """Build the model and load the weights.

        Args:
            tasks: a longer table; rows of its new tasks follow ``new_task_rows``.
            config: settings in place of the run's own, under which the weights fit.

        Raises:
            ConfigError: settings that cannot be used.
            StateError: weights that do not fit the settings.
        """
        config = self.config if config is None else config
        model = build_moe(config, self.tokenizer, self.tasks if tasks is None else tasks, ALONE)
        load_base(model, self.checkpoint)
        load_adapter(model, self.checkpoint)
        return TrainedRun(self.home, self.checkpoint, config, self.tokenizer, model.eval())


def open_run(run: str | Path, overrides: Sequence[str] = ()) -> OpenRun:
    """The newest whole checkpoint of a run, or the checkpoint itself.

    Args:
        overrides: settings as on a command line, on top of the run's own, but for those of ``moe``.

    Raises:
        ConfigError: not a run folder, or settings that cannot be used.
        CheckpointError: no whole checkpoint.
        StateError: no tokenizer.
    """
    folder = Path(run)
    home = folder if (folder / CONFIG).is_file() else folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{run}: no such run folder{nearest_folder(folder)}")
    if not (home / CONFIG).is_file():
        raise ConfigError(f"{run}: not a run folder (it has no {CONFIG})")
    try:
        path = checkpoint.find(folder)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(str(error).removeprefix("resume_from_checkpoint: ")) from error
    config = load(home / CONFIG, ["--deepspeed=null", *overrides])
    # Terms of the loss play no part, and what they read may be gone; all that counts is computed in fp32.
    moe = replace(with_saved_vectors(read_config(path), path), regularisers=None)
    config = replace(config, moe=moe, bf16=False, gradient_checkpointing=False)
    return OpenRun(home, path, config, saved_tokenizer(home / TOKENIZER), TaskTable.load(path / TASKS))


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """:func:`open_run`, with its model.

    Raises:
        ConfigError, CheckpointError, StateError: as :func:`open_run` and :meth:`OpenRun.load`.
    """
    return open_run(run, overrides).load()
