"""One task's prompt as an adapter of peft: prompt tuning, or prefix tuning for keys and values of layers.

Legend: l positions of a prompt, W numbers a position.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from taskmoe.moe.banks.prompt.entry import Prompts
from taskmoe.moe.banks.prompt.layers import LayerPrompts
from taskmoe.moe.collapse import CollapseError
from taskmoe.moe.heads import TaskLinear
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.peft_write import CONFIG, WEIGHTS, task_type

GENERATORS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@torch.no_grad()
def save_prompt(model: TaskMoEModel, task: int | str, folder: str | Path) -> None:
    """Write the prompt of ``task``: adapter_config.json, adapter_model.safetensors.

    Routed and shared prompts are written as they come out for the task. It belongs to the base model as it is
    here: where the base was trained too, save that beside it.

    Raises:
        CollapseError: experts that are no prompts; parts trained whole; a classifier or encoder, which would
            read another position in peft than here.
        TaskError: an unknown task.
    """
    number = model.tasks.id(task) if isinstance(task, str) else task
    prompts: Any = getattr(model, "prompts", None)
    if not isinstance(prompts, Prompts):
        bank = model.moe_config.bank
        raise CollapseError(f"moe.bank: {bank!r} is no prompt; save_lora writes what is a LoRA")
    for module in model.modules():
        if isinstance(module, TaskLinear | SavedModule):
            raise CollapseError(f"{module.name}: trained whole beside the prompts, which do not hold it")
    base: Any = model.base_model
    kind = task_type(base)
    if kind not in GENERATORS:
        raise CollapseError(
            f"{type(base).__name__}: peft's models read positions of the prompt where ours read the text's; "
            "keep the mixture (save_pretrained)"
        )
    prompt_lW = prompts.bank(model.context([number]))[0].float().cpu().contiguous()
    config: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "task_type": kind,
        "base_model_name_or_path": getattr(base.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "num_virtual_tokens": len(prompt_lW),
        "token_dim": prompt_lW.shape[1],
        "num_transformer_submodules": 1,  # an encoder-decoder's encoder alone
    }
    if isinstance(prompts, LayerPrompts):
        layers, heads, size = prompts.shape
        config |= {
            "peft_type": "PREFIX_TUNING",
            "token_dim": heads * size,
            "num_attention_heads": heads,
            "num_layers": layers,
            "prefix_projection": False,
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {"prompt_embeddings": prompt_lW}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
