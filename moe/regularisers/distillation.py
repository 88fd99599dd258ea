"""Distillation of prompts from those of teachers, one a task (the source training of MPT).

Legend: V vocabulary or labels, T tasks, Tb tasks in the batch, l positions of a prompt, W numbers a position.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.banks.prompt.kind import PromptKind
from taskmoe.moe.banks.prompt.saved import read_prompts
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.regularisers.base import Regulariser
from taskmoe.moe.tasks import TaskTable

if TYPE_CHECKING:
    from taskmoe.moe.context import Context
    from taskmoe.moe.model import TaskMoEModel

KEY = "moe.regularisers.distillation"


def distillation(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """temperature^2 times the mean of KL(teacher | student) of softmax(logits / temperature).

    Args:
        student, teacher: [..., V] logits, of one shape; bf16 and fp16 are computed in fp32.
        weights: [...], what each distribution counts; None: all alike. A class that both give -inf counts
            nothing.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p = torch.log_softmax(teacher.to(dtype) / temperature, -1)
    log_q = torch.log_softmax(student.to(dtype) / temperature, -1)
    # Filled before the product: zero times -inf would be nan, in the gradient too.
    gap = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    kl = (log_p.exp() * gap).sum(-1) * temperature**2
    if weights is None:
        return kl.mean()
    weights = weights.to(dtype)
    return (kl * weights).sum() / weights.sum().clamp_min(1)


class Distillation(Regulariser):
    """KL of a model with the teachers' prompts from this one, on the logits (MPT, Wang et al. 2023, arXiv
    2303.02861).

    Each micro-batch is run once more, without gradients or dropout, with the teachers' prompts in place of
    the model's own: the prompts of a saved adapter of ``bank: prompt`` on the same frozen base. The term is
    the mean over the positions of the text, padding left out (of a decoder that reads an encoder: over all),
    and over micro-batches.
    """

    sort: ClassVar[str] = "activations"
    absent: ClassVar[str] = "there are no prompts here"

    @dataclass(frozen=True)
    class Options:
        teacher: str = ""  # folder of a saved adapter with one prompt a task (bank: prompt)
        temperature: float = 1.0  # of both distributions; the term is multiplied by its square

        def __post_init__(self) -> None:
            if not self.teacher:
                raise ConfigError(
                    f"{KEY}.teacher: is missing; give a folder of a saved adapter of bank: prompt"
                )
            if not self.temperature > 0:
                raise ConfigError(f"{KEY}.temperature: {self.temperature} must be above 0")

    @classmethod
    def fits(cls, options: Options, config: TaskMoEConfig) -> bool:
        """See :class:`Regulariser`."""
        return isinstance(BANKS[config.bank], PromptKind)

    def __init__(self, options: Options, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        self.tasks = tasks
        self.prompts_TlW: Tensor | None = None  # the teachers', read at the first training step

    def enter(self, model: TaskMoEModel, name: str) -> int:
        prompts: Any = getattr(model, "prompts", None)
        if prompts is None:
            return 0
        model.base_model.register_forward_hook(_Hook(self, name, prompts), with_kwargs=True)
        return 1

    def teachers(self, like: Tensor) -> Tensor:
        """[T, l, W], rows in the order of this model's tasks; ``like``: prompts of its own, [Tb, l, W].

        Raises:
            ConfigError: no such adapter, of another shape, or without a prompt for one of the tasks.
        """
        if self.prompts_TlW is None:
            self.prompts_TlW, _ = read_prompts(self.options.teacher, self.tasks.names, f"{KEY}.teacher")
        if self.prompts_TlW.shape[1:] != like.shape[1:]:
            found, own = tuple(self.prompts_TlW.shape[1:]), tuple(like.shape[1:])
            raise ConfigError(f"{KEY}.teacher: its prompts are {found}, this model's {own}; use one length")
        self.prompts_TlW = self.prompts_TlW.to(like)
        return self.prompts_TlW


class _Hook:
    """Called behind the base model: the term joins its logits."""

    def __init__(self, term: Distillation, name: str, prompts: nn.Module) -> None:
        self.term, self.name, self.prompts = term, name, prompts

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        from taskmoe.moe.context import current, use

        context = current(self.name)
        if context.penalties is None or not torch.is_grad_enabled():
            return None
        with torch.no_grad(), use(self._taught(context)), _resting(model):
            teacher = model(*args, **kwargs).logits
        mask, logits = context.mask, output.logits
        of_text = context.mask_part is None and mask is not None and mask.shape == logits.shape[:-1]
        weights = mask if of_text else None
        value = distillation(logits, teacher, self.term.options.temperature, weights)
        output.logits = context.penalise(logits, self.name, value)
        return output

    def _taught(self, context: Context) -> Context:
        """``context`` with the teachers' prompts, and without terms."""
        taught = copy.copy(context)
        taught.penalties, taught.bridge = None, None
        bank: Any = self.prompts.bank
        taught.shared = {id(bank): lambda own: self._prompts(own, bank(own))}
        return taught

    def _prompts(self, context: Context, own: Tensor) -> Tensor:
        return self.term.teachers(own)[context.tasks]


class _resting:
    """A model in evaluation mode, and each module then as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before: list[tuple[nn.Module, bool]] = [(m, m.training) for m in self.model.modules()]
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        for module, training in self.before:
            module.training = training
