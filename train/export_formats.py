"""What can be written of a run, and how it is read again: adapters for peft, plain models, the mixture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from taskmoe.moe import TaskMoEModel, attach_heads, save_lora
from taskmoe.moe.banks.prompt.entry import Prompts
from taskmoe.moe.banks.prompt.export import save_prompt
from taskmoe.moe.collapse import Pair, trained_whole
from taskmoe.moe.heads import MeanPoolClassifier
from taskmoe.moe.merge_weights import merge
from taskmoe.moe.text_encoder import TextEncoder
from taskmoe.moe.wrappers import inside, load_head, save_head
from taskmoe.train.trained_run import TrainedRun


class Format(ABC):
    """One way to write a task; made once for a run.

    Args:
        trained: the run; base: the folder of its own base, or None: the base has a name of its own.
    """

    by_task: ClassVar[bool] = True  # a folder a task; otherwise one for all
    beside_base: ClassVar[bool] = True  # belongs to a base, and one that no hub has is saved too
    needs: ClassVar[str | None] = None  # what must be installed to read it

    def __init__(self, trained: TrainedRun, base: Path | None) -> None:
        self.trained, self.base = trained, base
        self.inner: Any = inside(trained.model.base_model)[0]

    @abstractmethod
    def write(self, task: int, pairs: Mapping[str, Pair] | None, folder: Path) -> None:
        """Write what one task uses; pairs: in place of its own."""

    @abstractmethod
    def read(self, task: int, folder: Path) -> nn.Module:
        """The written model of a task, by the way its users take: called like the base, in float32."""

    def load(self, where: str | Path, task: int) -> nn.Module:
        """A plain model of the run's class."""
        settings: dict[str, Any] = {"dtype": torch.float32}
        if self.trained.config.attn_implementation is not None:
            settings["attn_implementation"] = self.trained.config.attn_implementation
        model: nn.Module = type(self.inner).from_pretrained(where, **settings, **self.arguments(task))
        return model.eval()

    def load_base(self, task: int) -> nn.Module:
        """The base alone."""
        return self.load(self.base or self.inner.config._name_or_path, task)

    def around(self, model: nn.Module, folder: Path) -> nn.Module:
        """What the run has around its encoder, around another one."""
        own = self.trained.model.base_model
        if isinstance(own, MeanPoolClassifier):
            return MeanPoolClassifier(model, load_head(folder)[0])  # type: ignore[arg-type]
        if isinstance(own, TextEncoder):
            return TextEncoder(model, own.pooling, own.normalise, own.scale)
        return model

    def arguments(self, task: int) -> dict[str, Any]:
        """What ``from_pretrained`` must be told: the size of a head; that the run's model has no pooler."""
        found: dict[str, Any] = {}
        if self.trained.config.task_type == "SEQ_CLS" and self.trained.config.pooling == "model":
            found["num_labels"] = self.outputs(task)
        if getattr(self.inner, "pooler", self) is None:
            found["add_pooling_layer"] = False
        return found

    def outputs(self, task: int) -> int:
        """How many outputs a head has."""
        return len(self.trained.model.tasks[task].labels or ())


class Peft(Format):
    """A LoRA, or a prompt."""

    needs: ClassVar[str | None] = "peft"
    _plain: nn.Module | None = None  # the base without an adapter, between two tasks

    def write(self, task: int, pairs: Mapping[str, Pair] | None, folder: Path) -> None:
        if isinstance(getattr(self.trained.model, "prompts", None), Prompts):
            save_prompt(self.trained.model, task, folder)
        else:
            save_lora(self.trained.model, task, folder, pairs=pairs)

    def read(self, task: int, folder: Path) -> nn.Module:
        from peft import PeftModel

        if self._plain is not None and hasattr(self._plain, "unload"):
            self._plain = self._plain.unload()  # type: ignore[operator]
        if self._plain is None or trained_whole(self.inner, task):
            self._plain = self.load_base(task)
        found: Any = PeftModel.from_pretrained(self._plain, folder)
        if hasattr(found.base_model, "unload"):  # a prompt leaves its base as it is
            self._plain = found
        return self.around(found.eval(), folder)


class Merged(Format):
    """A plain model, as transformers saves it."""

    beside_base = False

    def write(self, task: int, pairs: Mapping[str, Pair] | None, folder: Path) -> None:
        plain: Any = merge(self.trained.model, task, pairs)
        inner: Any = inside(plain)[0]
        inner.save_pretrained(folder)
        self.trained.tokenizer.save_pretrained(folder)
        if isinstance(plain, MeanPoolClassifier):
            save_head(plain.classifier, self.trained.model.tasks[task].labels or (), folder)  # type: ignore[arg-type]

    def read(self, task: int, folder: Path) -> nn.Module:
        return self.around(self.load(folder, task), folder)


class Mixture(Format):
    """The whole mixture, as ``TaskMoEModel.from_pretrained`` reads it."""

    by_task = False

    def write(self, task: int, pairs: Mapping[str, Pair] | None, folder: Path) -> None:
        self.trained.model.save_pretrained(folder)

    def read(self, task: int, folder: Path) -> nn.Module:
        config, tasks = self.trained.config, self.trained.model.tasks
        base: Any = self.load_base(task)
        if config.task_type == "SEQ_CLS":
            base = attach_heads(base, tasks, config.pooling)
        elif isinstance(own := self.trained.model.base_model, TextEncoder):
            base = TextEncoder(base, own.pooling, own.normalise, own.scale)
        return OfTask(TaskMoEModel.from_pretrained(base, folder).eval(), task)

    def outputs(self, task: int) -> int:
        return max(len(t.labels or ()) for t in self.trained.model.tasks)


class OfTask(nn.Module):
    """A mixture whose rows all belong to one task."""

    def __init__(self, model: TaskMoEModel, task: int) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **inputs: Any) -> Any:
        """inputs: those of the base model."""
        return self.model(**inputs, task_ids=torch.full((len(inputs["input_ids"]),), self.task))


FORMATS: dict[str, type[Format]] = {"peft": Peft, "merged": Merged, "taskmoe": Mixture}
