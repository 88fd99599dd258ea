"""Deep prompts: keys and values of each task before those of every layer (P-Tuning v2: Liu et al. 2022, arXiv
2110.07602; Li and Liang 2021, arXiv 2101.00190).

Legend: B sequences (times beams), L positions of the text, l of the prompt, n layers, h heads of keys and
values, d numbers a head, W = n * 2 * h * d.

A decoder finds them in its cache, as if it had read them. Without a cache, under activation checkpointing
(transformers then keeps the cache from the layers) and in encoders, a hook gives them to each attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from taskmoe.moe.banks.prompt.entry import NAME, Prompts, embed, named_length
from taskmoe.moe.banks.prompt.site import Site, by_name, parameters
from taskmoe.moe.config import ConfigError
from taskmoe.moe.context import GateBridge, current


class Prefix(DynamicCache):
    """Keys and values that stand before those of this call; they are not kept, so that it may run again."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        """leaves: keys and values of each layer in turn, [B, h, l, d]."""
        super().__init__()
        self.asked: set[int] = set()
        for i, (keys, values) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
            super().update(keys, values, i)

    def fill(self, cache: Any) -> Any:
        """``cache``, which was empty, with the prefix in it: every layer will read it there."""
        layers: list[Any] = self.layers
        for i, layer in enumerate(layers):
            cache.update(layer.keys, layer.values, i)
        self.asked.update(range(len(layers)))
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Both [B, h, L, d] -> [B, h, l + L, d]."""
        self.asked.add(layer_idx)
        mine: Any = self.layers[layer_idx]
        keys = torch.cat([mine.keys.to(key_states.dtype), key_states], dim=2)
        return keys, torch.cat([mine.values.to(value_states.dtype), value_states], dim=2)


def attentions(site: Site) -> list[nn.Module]:
    """The self-attention of every layer.

    Raises:
        ConfigError: the model's attention cannot be given keys and values.
    """
    config: Any = site.body.config
    names = {id(m): n for n, m in site.body.named_modules()}
    found = [
        m
        for m in site.body.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and "past_key_values" in parameters(m)
        and "cross" not in (type(m).__name__ + names[id(m)]).lower()
    ]
    windows = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None) is not None:
        windows = {"sliding_attention"}
    reason = None
    if site.decoder is not None:
        reason = "encoder-decoder models take none (T5 computes relative positions for its own keys alone)"
    elif {m.layer_idx for m in found} != set(range(config.num_hidden_layers)):
        reason = "its attention does not take past_key_values in every layer"
    elif windows:
        reason = f"it has layers of {', '.join(sorted(windows))}, which would forget them"
    if reason is not None:
        raise ConfigError(
            f"moe.bank_options.where: 'layers' does not work on {type(site.body).__name__}: {reason}; "
            "use where: input"
        )
    return found


def geometry(site: Site) -> tuple[int, int, int]:
    """(n layers, h heads of keys and values, d numbers a head) of the body."""
    config: Any = site.body.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


class LayerPrompts(Prompts):
    """Prefixes of length l before the keys and values of every layer.

    Text keeps its positions in an encoder; in a decoder the prefix takes the first l.
    """

    def __init__(self, bank: nn.Module, length: int, site: Site) -> None:
        self.shape = geometry(site)
        super().__init__(bank, length, site)

    def install(self, site: Site) -> None:
        site.body.register_forward_pre_hook(self.enter, with_kwargs=True)
        site.body.register_forward_hook(self.leave)
        for attention in attentions(site):
            attention.register_forward_pre_hook(self.attend, with_kwargs=True)

    def enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = current(NAME)
        if not context.enabled:
            return None
        named = by_name(body, args, kwargs)
        context.shared[id(self)] = None
        seen = self.seen(named)
        length = named_length(named)
        if not seen:
            embedded = embed(body, named)
            n, h, d = self.shape
            prompts_BlW = self.rows(context, embedded.shape[0], embedded)
            prefix_SBhld = prompts_BlW.unflatten(2, (2 * n, h, d)).permute(2, 0, 3, 1, 4)
            leaves: Any = prefix_SBhld.unbind(0)
            if context.checkpointing and torch.is_grad_enabled() and prefix_SBhld.requires_grad:
                # Reentrant recomputes would each walk back through the bank: see GateBridge.
                bridge = GateBridge(prefix_SBhld)
                embedded, leaves = bridge(embedded), bridge.leaves
            named["inputs_embeds"] = embedded
            context.shared[id(self)] = prefix = Prefix(leaves)
            if self.causal:
                past = named.get("past_key_values")
                if past is None and self._caches(body, named):
                    past = DynamicCache(config=body.config)  # type: ignore[arg-type]
                named["past_key_values"] = prefix if past is None else prefix.fill(past)
            elif named.get("attention_mask") is None:
                named["attention_mask"] = embedded.new_ones(embedded.shape[:2], dtype=torch.long)
        self.extend(named, length, seen)
        return (), named

    def attend(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of an attention: the prefix, where it has no cache."""
        context = current(NAME)
        named = by_name(attention, args, kwargs)
        if not context.enabled or named.get("past_key_values") is not None:
            return None
        named["past_key_values"] = context.shared[id(self)]
        return (), named

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook of the body: take back a prefix that is no cache, having checked that every layer has used it.

        Raises:
            RuntimeError: an attention went without.
        """
        context = current(NAME)
        prefix = context.shared.get(id(self)) if context.enabled else None
        if prefix is None:
            return None
        missing = sorted(set(range(self.shape[0])) - prefix.asked)
        if missing:
            raise RuntimeError(f"{type(module).__name__}: layers {missing} have not read their prompt")
        if isinstance(output, dict) and output.get("past_key_values") is prefix:
            output["past_key_values"] = None
        return output

    def _caches(self, body: nn.Module, named: dict[str, Any]) -> bool:
        """Whether this call makes a cache that outlives it."""
        if body.training and any(getattr(m, "gradient_checkpointing", False) for m in body.modules()):
            return False
        wanted = named.get("use_cache")
        return bool(getattr(body.config, "use_cache", False) if wanted is None else wanted)
