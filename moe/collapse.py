"""One task of a mixture as one plain LoRA a linear: where routing depends on the task alone, nothing is lost.

Legend: R rank of the result, K d_in, N d_out, H heads, E experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.heads import TaskLinear
from taskmoe.moe.layer import MoELinear, SavedModule
from taskmoe.moe.model import TaskMoEModel

# What peft calls a model by the end of its class's name.
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}


class CollapseError(ValueError):
    """A mixture of which no task is a plain LoRA: the message says why."""


class Pair(NamedTuple):
    """A_RK [R, K] and B_RN [R, N], float32: the linear computes ``W0 x + B^T A x``, scales folded into B."""

    A_RK: Tensor
    B_RN: Tensor


@torch.no_grad()
def collapse(model: TaskMoEModel, task: int | str) -> dict[str, Pair]:
    """{name of a linear of the base model: what the experts of ``task`` add to it}.

    The rank is that of the experts with a gate other than zero together (``compose: after``), or of one
    expert.

    Raises:
        CollapseError: gates depend on tokens, or experts are not pairs of factors beside a linear.
        TaskError: an unknown task.
    """
    number = model.tasks.id(task) if isinstance(task, str) else task
    config = model.moe_config
    linears = {n: m for n, m in model.base_model.named_modules() if isinstance(m, MoELinear)}
    beside = {id(m) for linear in linears.values() for m in linear.modules()}
    if any(linear.token_routing is not None for linear in linears.values()):
        raise CollapseError(
            f"moe.router: {config.router!r} gives each token gates of its own, so that no one LoRA is what a "
            "task uses; keep the mixture (save_pretrained), or train with a router by task"
        )
    others = any(isinstance(m, Bank) and id(m) not in beside for m in model.modules())
    if not linears or others or not all(hasattr(m.bank, "of_task") for m in linears.values()):
        raise CollapseError(
            f"moe.bank: {config.bank!r} is no product of two factors that the task alone decides, so that no "
            "LoRA equals it; keep the mixture (save_pretrained)"
        )
    gates = {name: gates_THE[number] for name, gates_THE in model.gates().items()}
    pairs = {}
    for name, linear in linears.items():
        A_RK, B_RN = linear.bank.of_task(gates[model.routing.groups[linear.group]], number)
        pairs[name] = Pair(A_RK.float().contiguous(), B_RN.float().contiguous())
    return pairs


def save_lora(model: TaskMoEModel, task: int | str, folder: str | Path) -> None:
    """Write what a task uses as an adapter of peft: adapter_config.json, adapter_model.safetensors.

    It belongs to the base model as it is here: where the base was trained too, save that beside it.

    Raises:
        CollapseError: as :func:`collapse`; heads a task or saved modules, which a LoRA does not hold; or a
            task that uses no expert.
        TaskError: an unknown task.
    """
    for module in model.modules():
        if isinstance(module, TaskLinear | SavedModule):
            raise CollapseError(
                f"{module.name}: trained whole beside the experts, and a LoRA does not hold it; collapse() "
                "gives the factors of the linears"
            )
    pairs = {n: p for n, p in collapse(model, task).items() if len(p.A_RK)}
    if not pairs:
        name = task if isinstance(task, str) else model.tasks.names[task]
        raise CollapseError(
            f"task {name!r}: its gates are zero on every expert, so that there is no LoRA to write; the base "
            "model alone is what it uses"
        )
    base = model.base_model
    ranks = {name: len(pair.A_RK) for name, pair in pairs.items()}
    r = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != r}
    kind = next((t for end, t in TASK_TYPES.items() if type(base).__name__.endswith(end)), None)
    config = {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": getattr(getattr(base, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pairs),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "fan_in_fan_out": any(_is_conv1d(base.get_submodule(name)) for name in pairs),
    }
    state = {}
    for name, pair in pairs.items():
        state[f"base_model.model.{name}.lora_A.weight"] = pair.A_RK.cpu()
        state[f"base_model.model.{name}.lora_B.weight"] = pair.B_RN.T.contiguous().cpu()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _is_conv1d(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base", module), Conv1D)
