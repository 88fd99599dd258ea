"""One task of a mixture as one plain LoRA a linear: where routing depends on the task alone, nothing is lost.

Legend: R rank of the result, K d_in, N d_out, H heads, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.heads import MeanPoolClassifier, TaskLinear
from taskmoe.moe.layer import MoELinear, SavedModule
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.peft_write import write_lora
from taskmoe.moe.wrappers import inside, save_head


class CollapseError(ValueError):
    """A mixture of which no task is a plain LoRA: the message says why."""


class Pair(NamedTuple):
    """A_RK [R, K] and B_RN [R, N], float32: the linear computes ``W0 x + B^T A x``, scales folded into B."""

    A_RK: Tensor
    B_RN: Tensor


@torch.no_grad()
def collapse(
    model: TaskMoEModel, task: int | str, token_gates: Mapping[str, Tensor] | None = None
) -> dict[str, Pair]:
    """{name of a linear of the base model: what the experts of ``task`` add to it}.

    The rank is that of the experts with a gate other than zero together (``compose: after``), or of one
    expert.

    Args:
        token_gates: {linear: [T, H, E]}, say the mean gates of a task's tokens, where layers route tokens
            themselves: they stand in for what tokens choose, and the result is no longer exact.

    Raises:
        CollapseError: gates depend on tokens and none are given, or experts are not pairs of factors beside a
            linear.
        TaskError: an unknown task.
    """
    number = model.tasks.id(task) if isinstance(task, str) else task
    config = model.moe_config
    linears, others = expert_linears(model)
    by_token = {n for n, linear in linears.items() if linear.token_routing is not None}
    if by_token and token_gates is None:
        raise CollapseError(
            f"moe.router: {config.router!r} gives each token gates of its own, so that no one LoRA is what a "
            "task uses; keep the mixture (save_pretrained), take the mean gates of the task's tokens "
            "(taskmoe export --average), or train with a router by task"
        )
    if not linears or others or not all(hasattr(m.bank, "of_task") for m in linears.values()):
        raise CollapseError(
            f"moe.bank: {config.bank!r} is no product of two factors that the task alone decides, so that no "
            "LoRA equals it; keep the mixture (save_pretrained)"
        )
    gates = {name: gates_THE[number] for name, gates_THE in model.gates().items()}
    for name in by_token:
        gates[name] = token_gates[name][number]  # type: ignore[index]
        if not bool(gates[name].isfinite().all()):
            raise CollapseError(
                f"task {model.tasks.names[number]!r}: no tokens of it have been seen at {name}"
            )
    pairs = {}
    for name, linear in linears.items():
        group = name if name in by_token else model.routing.groups[linear.group]
        A_RK, B_RN = linear.bank.of_task(gates[group].to(model.device), number)
        pairs[name] = Pair(A_RK.float().contiguous(), B_RN.float().contiguous())
    return pairs


def expert_linears(model: TaskMoEModel) -> tuple[dict[str, MoELinear], bool]:
    """{name in the base model: a linear with experts}, and whether there are experts elsewhere too."""
    linears = {n: m for n, m in model.base_model.named_modules() if isinstance(m, MoELinear)}
    beside = {id(m) for linear in linears.values() for m in linear.modules()}
    return linears, any(isinstance(m, Bank) and id(m) not in beside for m in model.modules())


@torch.no_grad()
def save_lora(
    model: TaskMoEModel,
    task: int | str,
    folder: str | Path,
    *,
    pairs: Mapping[str, Pair] | None = None,
) -> None:
    """Write what a task uses as an adapter of peft: adapter_config.json, adapter_model.safetensors.

    It belongs to the base model as it is here: where the base was trained too, save that beside it. The
    task's head and saved modules stand in it whole (``modules_to_save``). A head on mean-pooled states is no
    module of the Hugging Face model: it goes into head.safetensors (:func:`taskmoe.moe.wrappers.load_head`).

    Args:
        pairs: written in place of those of :func:`collapse`, say truncated.

    Raises:
        CollapseError: as :func:`collapse`; or a task that uses no expert.
        TaskError: an unknown task.
    """
    number = model.tasks.id(task) if isinstance(task, str) else task
    found = collapse(model, number) if pairs is None else pairs
    base, prefix = inside(model.base_model)
    found = {name.removeprefix(prefix): pair for name, pair in found.items() if len(pair.A_RK)}
    if not found:
        raise CollapseError(
            f"task {model.tasks.names[number]!r}: its gates are zero on every expert, so that there is no "
            "LoRA to write; the base model alone is what it uses"
        )
    write_lora(base, found, folder, whole=trained_whole(base, number))
    if isinstance(model.base_model, MeanPoolClassifier):
        head = model.base_model.classifier.of_task(number)
        save_head(head, model.tasks[number].labels or (), folder)


def trained_whole(base: nn.Module, task: int) -> dict[str, nn.Module]:
    """{name in ``base``: what stands there for one task}: saved modules, and what holds heads per task."""
    heads = {id(m): m.of_task(task) for m in base.modules() if isinstance(m, TaskLinear)}
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(module, SavedModule):
            found[name] = module.saved
        elif isinstance(module, TaskLinear):  # heads of more than a linear are one module to peft
            top = name.partition(".")[0]
            found[top] = copy.deepcopy(base.get_submodule(top), dict(heads))
    return found
