"""One task's model without experts: each module is the expert that the task's gate is largest on."""

from __future__ import annotations

from torch import nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.banks.module.experts import Deferred, ModuleExperts, PairExperts
from taskmoe.moe.banks.module.stack import ModuleStack
from taskmoe.moe.banks.module.targets import PAIR
from taskmoe.moe.config import ConfigError
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.plain_copy import plain_copy


def squeeze(model: TaskMoEModel, task: str) -> nn.Module:
    """A plain Hugging Face model on the path of ``task``, say to fine-tune it on (Ye, Zha, Ren 2022).

    ``model`` stays as it is. With one-hot gates the squeezed model computes what ``model`` does for the task.

    Args:
        model: with ``bank: module`` and a router by task.
        task: a name of its table.

    Returns:
        A copy of the base model, all of it free to train, in the dtype of the base.

    Raises:
        ConfigError: experts that are no modules, or gates of tokens.
        TaskError: a task that is not in the table.
    """
    number = model.tasks.id(task)
    if model.routing.router is None:
        raise ConfigError("squeeze: tokens are routed one by one, so a task has no path of its own")
    gates = list(model.gates().values())
    for name, module in model.base_model.named_modules():
        if isinstance(module, Bank) and not isinstance(module, ModuleStack):
            raise ConfigError(f"squeeze: {name} is no copy of a module (moe.bank: module); merge it instead")
    plain = plain_copy(model, number, {})
    for name, module in list(plain.named_modules()):
        if isinstance(module, ModuleExperts):
            original = module.plain(int(gates[module.group][number].mean(0).argmax()))
            pair = isinstance(module, PairExperts)
            _put(plain, name, original.get_submodule(PAIR[1]) if pair else original)
        elif isinstance(module, Deferred):
            _put(plain, name, module.original)
    return plain


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
