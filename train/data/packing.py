"""Several rows in one sequence, for causal LMs that keep them apart by position ids alone.

A pack restarts ``position_ids`` at every row. transformers then builds a block-diagonal causal mask, but only
without an attention mask and with ``use_cache=False`` (``masking_utils._preprocess_mask_arguments``; a model
makes a cache unless told otherwise, in training too, and then its rows see each other). Flash attention reads
the restarts itself, but only in a batch of one sequence
(``modeling_flash_attention_utils._is_packed_sequence``): hence the flat layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from taskmoe.moe.choices import refuses_packs
from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config

_ROWS = ("eager", "sdpa", "flex_attention")  # any number of packs in a batch
FLAT_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # one long sequence


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Greedy first fit in the given order: indices of the rows of each pack.

    A row longer than ``max_length`` gets a pack of its own.

    >>> pack([5, 4, 3, 2], 8)
    [[0, 2], [1, 3]]
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        for p, free in enumerate(room):
            if length <= free:
                packs[p].append(i)
                room[p] -= length
                break
        else:
            packs.append([i])
            room.append(max_length - length)
    return packs


def supports_packing(model: Any, config: Config) -> str | None:
    """Why this model cannot pack, or None when it can.

    Args:
        model: the Hugging Face model, before ``attach``.
        config: of the run (its ``task_type`` and ``moe.bank``).

    The model's own forward decides, on a few tokens: position ids may be accepted and ignored (T5), and a
    model may look both ways (BERT). A flash backend is trusted, because it runs on a GPU only.
    """
    name = getattr(model.config, "model_type", type(model).__name__)
    if config.task_type != "CAUSAL_LM":
        return f"task_type {config.task_type} cannot pack; only CAUSAL_LM can"
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; only decoders can pack"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids"
    refused = refuses_packs(config.moe)
    if refused is not None:
        return refused
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in _ROWS + FLAT_ATTENTION:
        return f"attn_implementation {attention!r} is not known to keep packed rows apart"
    if attention in FLAT_ATTENTION or any(p.is_meta or p.numel() == 0 for p in model.parameters()):
        return None
    return _probe(model, f"{name} with attn_implementation {attention}")


def require_packing(model: Any, config: Config) -> None:
    """Refuse a model that cannot pack.

    Raises:
        ConfigError: one line with the reason.
    """
    reason = supports_packing(model, config)
    if reason is not None:
        raise ConfigError(f"data.packing: {reason}; set data.packing: false")


@torch.no_grad()
def _probe(model: Any, name: str) -> str | None:
    """Two rows in one pack: neither may see the other, and each must get the logits it gets alone."""
    embedding = model.get_input_embeddings().weight
    vocabulary, device = embedding.shape[0], embedding.device
    ids = torch.tensor([[(7 * i + 3) % vocabulary for i in range(9)]], device=device)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=device)
    first = torch.arange(9, device=device) < 5
    other = (ids + vocabulary // 2) % vocabulary

    def logits(x: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return model(input_ids=x, use_cache=False, **inputs).logits.float()

    training = model.training
    model.eval()
    try:
        packed = logits(ids, position_ids=position_ids)
        second_changed = logits(torch.where(first, ids, other), position_ids=position_ids)
        first_changed = logits(torch.where(first, other, ids), position_ids=position_ids)
        alone = torch.cat([logits(ids[:, :5]), logits(ids[:, 5:])], dim=1)
    finally:
        model.train(training)
    scale = packed.abs().max().clamp_min(1e-12)
    leak = torch.where(first[:, None], packed - second_changed, packed - first_changed).abs().max() / scale
    if leak > 1e-6:
        return f"{name} lets packed rows see each other (relative difference {leak:.0e})"
    # Other shapes round differently, in half precision by percents; wrong positions show in the first digit.
    error = (packed - alone).abs().max() / scale
    if error > (1e-4 if embedding.dtype in (torch.float32, torch.float64) else 0.1):
        return f"{name} does not restart positions in packed rows (relative difference {error:.0e})"
    return None
