"""Where prompts enter a Hugging Face model: the module that embeds the text, and its neighbours."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from taskmoe.moe.config import ConfigError


@dataclass(frozen=True)
class Site:
    """Where a model is changed.

    body: embeds the text and runs the layers that see the prompt: a decoder, or an encoder. cut: the part of
    the body after which the prompt's positions are cut off, so that what follows (a pooler, a head) finds the
    text where it always is; None: nothing is cut, the decoder must see them. decoder: reads what the body
    made, in an encoder-decoder model; else None. causal: the body is a decoder itself, perhaps with a cache.
    """

    body: nn.Module
    cut: nn.Module | None
    decoder: nn.Module | None
    causal: bool


def find_site(model: nn.Module) -> Site:
    """The site of a text model.

    Raises:
        ConfigError: no part of the model takes embeddings with a mask, or its cache is of a kind of its own.
    """
    hf: Any = model
    if getattr(hf.config, "is_encoder_decoder", False):
        encoder, decoder = hf.get_encoder(), hf.get_decoder()
        if encoder is not decoder and _takes_text(encoder) and "encoder_hidden_states" in parameters(decoder):
            return Site(encoder, None, decoder, causal=False)
    candidates = (hf.get_decoder(), hf.base_model, model)
    body: Any = next((m for m in candidates if _takes_text(m)), None)
    if body is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ConfigError(
            f"moe.bank: prompts stand before an embedded text, and no part of {type(model).__name__} takes "
            "input_ids, inputs_embeds and attention_mask; choose another bank"
        )
    generates = bool(getattr(model, "can_generate", lambda: False)())
    causal = generates or any(getattr(m, "is_causal", False) is True for m in body.modules())
    if causal and "past_key_values" not in parameters(body):
        raise ConfigError(
            f"moe.bank: {type(body).__name__} has a cache of its own kind instead of past_key_values, which "
            "does not say whether a prompt has been read; choose another bank"
        )
    layers = getattr(body, "encoder", None)
    pools = getattr(body, "pooler", None) is not None and isinstance(layers, nn.Module)
    return Site(body, layers if pools else body, None, causal)


def parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of ``module.forward``, in order."""
    return list(inspect.signature(module.forward).parameters)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``, all by name."""
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs}


def _takes_text(module: Any) -> bool:
    wanted = {"input_ids", "inputs_embeds", "attention_mask"}
    return hasattr(module, "get_input_embeddings") and wanted <= set(parameters(module))
