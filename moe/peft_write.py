"""LoRAs as peft saves them, written: adapter_config.json and adapter_model.safetensors of one folder.

Legend: R rank, K d_in, N d_out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from taskmoe.moe.collapse import Pair

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft calls a model by the end of its class's name.
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
}


def about(base: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """What an adapter says of its base; names: of the linears that it adds to.

    Args:
        base: the Hugging Face model, with or without experts in it.
    """
    return {
        "task_type": task_type(base),
        "base_model_name_or_path": getattr(getattr(base, "config", None), "_name_or_path", None) or None,
        "fan_in_fan_out": any(is_conv1d(base.get_submodule(name)) for name in names),
    }


def write_lora(
    base: nn.Module | Mapping[str, Any],
    pairs: Mapping[str, Pair],
    folder: str | Path,
    *,
    whole: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write pairs as a LoRA of scale 1: ``lora_alpha`` is the rank, of each linear its own.

    Args:
        base: the Hugging Face model that they belong to, or what :func:`about` says of it.
        pairs: {linear of ``base``: A and B}, each of rank 1 or more.
        whole: {module of ``base``: what stands in its place}, peft's ``modules_to_save``.
    """
    whole = whole or {}
    ranks = {name: len(pair.A_RK) for name, pair in pairs.items()}
    r = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        **(about(base, pairs) if isinstance(base, nn.Module) else base),
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pairs),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": sorted(whole) or None,
    }
    state = {}
    for name, pair in pairs.items():
        state[f"base_model.model.{name}.lora_A.weight"] = pair.A_RK.contiguous().cpu()
        state[f"base_model.model.{name}.lora_B.weight"] = pair.B_RN.T.contiguous().cpu()
    for name, module in whole.items():
        for n, tensor in module.state_dict().items():
            state[f"base_model.model.{name}.{n}"] = tensor.detach().cpu().clone().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def task_type(base: nn.Module) -> str | None:
    """What peft calls the task of a model, if it has a name for it."""
    return next((t for end, t in TASK_TYPES.items() if type(base).__name__.endswith(end)), None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a linear, with experts or without, keeps its weight as [K, N]."""
    return isinstance(getattr(module, "base", module), Conv1D)
