"""Whether an exported adapter, in the hands of peft, says what the run says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taskmoe.moe.collapse import trained_whole
from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.heads import MeanPoolClassifier
from taskmoe.moe.text_encoder import TextEncoder
from taskmoe.moe.wrappers import inside, load_head
from taskmoe.train.trained_run import TrainedRun

BOUND = 1e-5  # of the largest logit, in float32


class CheckError(ValueError):
    """The exported files do not say what the run says, or cannot be checked."""


class Checker:
    """Loads adapters with peft onto the base that they name, and compares logits on a few made-up sequences.

    Raises:
        CheckError: peft is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise CheckError("the check needs peft: pip install peft, or give --no_check")
        self._base: nn.Module | None = None  # loaded, and without an adapter

    def begin(self, trained: TrainedRun, base: Path | None) -> None:
        """base: the folder of the run's own base; None: one of the hub."""
        self.trained, self.folder = trained, base
        self.inner: Any = inside(trained.model.base_model)[0]
        self.inputs = example_inputs(self.inner)

    @torch.no_grad()
    def difference(self, task: str, folder: Path, exact: bool) -> float:
        """The largest difference of logits between an adapter and the run, over the run's largest logit.

        Raises:
            CheckError: it is above ``BOUND`` although the adapter should be ``exact``.
        """
        from peft import PeftModel

        number = self.trained.model.tasks.id(task)
        labels = len(self.trained.model.tasks[number].labels or ())
        whole = bool(trained_whole(self.inner, number))
        if self._base is None:
            self._base = self._load(labels if whole else None)
        theirs: Any = PeftModel.from_pretrained(self._base, folder).eval()
        rows = len(self.inputs["input_ids"])
        expected = self.trained.model(**self.inputs, task_ids=[task] * rows).logits
        found = self._around(theirs, folder)(**self.inputs).logits
        if whole:
            self._base, expected = None, expected[..., : found.shape[-1]]  # without what is beyond its labels
        elif hasattr(theirs.base_model, "unload"):
            self._base = theirs.unload()
        # A prompt's own positions come first in peft.
        found = found[..., -expected.shape[-2] :, :]
        difference = float((found - expected).abs().max() / expected.abs().max())
        if exact and not difference <= BOUND:
            raise CheckError(
                f"task {task!r}: in peft the logits differ from the run's by {difference:.1e} of the "
                f"largest, more than {BOUND:.0e}; nothing was written (--no_check writes it all the same)"
            )
        return difference

    def _load(self, num_labels: int | None) -> nn.Module:
        settings: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
        if self.trained.config.attn_implementation is not None:
            settings["attn_implementation"] = self.trained.config.attn_implementation
        where = self.folder or self.inner.config._name_or_path
        model: nn.Module = type(self.inner).from_pretrained(where, dtype=torch.float32, **settings)
        return model.eval()

    def _around(self, model: nn.Module, folder: Path) -> nn.Module:
        """What the run has around its encoder, around another one."""
        own = self.trained.model.base_model
        if isinstance(own, MeanPoolClassifier):
            return MeanPoolClassifier(model, load_head(folder)[0])  # type: ignore[arg-type]
        if isinstance(own, TextEncoder):
            return TextEncoder(model, own.pooling, own.normalise, own.scale)
        return model
