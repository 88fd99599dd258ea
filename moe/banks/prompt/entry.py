"""How soft prompts get into a forward pass: before the embedded text, and out again behind the layers.

Legend: B sequences (times beams), L positions of the text, l of the prompt, T tasks, W numbers a position.

The hooks are on the body of the model, not on the model: what pools, generates or takes a loss works on
positions of the text alone, and a decoder that continues finds the prompt in its cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.moe.banks.prompt.site import Site, by_name, parameters
from taskmoe.moe.context import Context, RowSpaceError, current

NAME = "prompts"  # what a TaskMoEModel calls them


class Prompts(nn.Module):
    """Soft prompts of length l before the embeddings of each sequence: its task's.

    A module for the sake of its bank, which is part of it; never called.
    """

    def __init__(self, bank: nn.Module, length: int, site: Site) -> None:
        super().__init__()
        self.bank, self.length = bank, length
        self.causal = site.causal
        self.takes_positions = site.causal and "position_ids" in parameters(site.body)
        self.install(site)

    def install(self, site: Site) -> None:
        """Put the hooks on the model."""
        site.body.register_forward_pre_hook(self.enter, with_kwargs=True)
        if site.decoder is not None:
            site.decoder.register_forward_pre_hook(self.enter_decoder, with_kwargs=True)
        if site.cut is not None:
            site.body.register_forward_hook(self.leave)
            if site.cut is not site.body:
                site.cut.register_forward_hook(self.leave)

    def enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the body: its arguments, with the prompt before the text."""
        context = current(NAME)
        if not context.enabled:
            return None
        named = by_name(body, args, kwargs)
        seen = self.seen(named)
        context.shared[id(self)] = 0
        if not seen:
            embedded = embed(body, named)
            prompts_BlW = self.rows(context, embedded.shape[0], embedded)
            named["inputs_embeds"] = torch.cat([prompts_BlW, embedded], dim=1)
            context.shared[id(self)] = named["inputs_embeds"].shape[1]
            kinds = named.get("token_type_ids")
            if kinds is not None:
                named["token_type_ids"] = torch.cat([kinds[:, :1].expand(-1, self.length), kinds], dim=1)
        self.extend(named, named_length(named), seen)
        return (), named

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook behind the layers: hidden states [B, l + L, D] become [B, L, D]."""
        context = current(NAME)
        length = context.shared.get(id(self), 0) if context.enabled else 0
        return _cut(output, length, self.length) if length else None

    def enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of a decoder that reads what the body made: it may read the prompt's positions.

        Raises:
            ValueError: what it reads was made elsewhere, without a prompt.
        """
        context = current(NAME)
        if not context.enabled:
            return None
        if not context.shared.get(id(self)):
            raise ValueError("encoder_outputs were made without prompts: pass input_ids or inputs_embeds")
        named = by_name(decoder, args, kwargs)
        mask, states = named.get("encoder_attention_mask"), named.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[-1] + self.length == states.shape[1]:
            named["encoder_attention_mask"] = before(mask, self.length, NAME)
        return (), named

    def rows(self, context: Context, sequences: int, like: Tensor) -> Tensor:
        """The prompt of each sequence, [B, l, W], in the dtype and on the device of ``like``.

        Raises:
            RowSpaceError: packed rows.
        """
        if context.packed:
            raise RowSpaceError(
                "packed task_ids ([B, L]) with prompts: a row of several tasks has no one place for "
                "it; turn packing off"
            )
        bank = context.shared.get(id(self.bank), self.bank)  # a teacher's, where one stands in
        prompts_TlW = bank(context).to(like)
        return by_sequence(prompts_TlW, context.plan((sequences,), NAME))

    def seen(self, named: dict[str, Any]) -> int:
        """How many positions the cache of this call holds."""
        past = named.get("past_key_values")
        if past is None:
            return 0
        if getattr(past, "is_compileable", False):
            raise ValueError("a static cache has no room for prompts: leave out cache_implementation")
        return int(past.get_seq_length())

    def extend(self, named: dict[str, Any], length: int, seen: int) -> None:
        """Make the mask and the positions of the text those of prompt and text.

        length: positions that the body is given now. Positions of a causal model count what the mask shows,
        as in ``generate``: padding on the left moves nothing.
        """
        mask = named.get("attention_mask")
        if mask is not None:
            mask = named["attention_mask"] = before(mask, self.length, NAME)
        if not self.takes_positions:
            return
        positions = named.get("position_ids")
        if positions is not None:
            if positions.dim() != 2:
                raise ValueError(f"position_ids have shape {tuple(positions.shape)}; prompts need [B, L]")
            positions = positions + self.length
            if length > positions.shape[1]:
                first = torch.arange(self.length, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([first, positions], dim=1)
        elif mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        named["position_ids"] = positions


def embed(body: nn.Module, named: dict[str, Any]) -> Tensor:
    """The embeddings of a call's text, [B, L, D]; takes both forms of it out of ``named``."""
    ids, embedded = named.pop("input_ids", None), named.pop("inputs_embeds", None)
    return body.get_input_embeddings()(ids) if embedded is None else embedded  # type: ignore[operator]


def named_length(named: dict[str, Any]) -> int:
    """The positions that a call gives the body."""
    embedded = named.get("inputs_embeds")
    return int((named["input_ids"] if embedded is None else embedded).shape[1])


def before(mask: Tensor, length: int, name: str) -> Tensor:
    """mask: [B, L], nonzero where there is text -> [B, l + L].

    Raises:
        ValueError: a mask of another shape.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: attention_mask is {what}; prompts need one of shape [B, L]")
    return torch.cat([mask.new_ones(len(mask), length), mask], dim=1)


def by_sequence(prompts_TlW: Tensor, plan: Plan) -> Tensor:
    """The prompt of each of the plan's rows, [B, l, W]. Gradients are summed in the order of the rows."""
    of_task = prompts_TlW.unbind(0)
    return torch.cat([of_task[t].expand(end - start, -1, -1) for t, start, end in plan.segments()])


def _cut(output: Any, length: int, off: int) -> Any:
    """``output`` of a module without the first ``off`` of the ``length`` positions of its hidden states."""
    if isinstance(output, Tensor):
        return output[:, off:] if output.dim() == 3 and output.shape[1] == length else output
    if isinstance(output, tuple):
        return tuple(_cut(part, length, off) for part in output)
    if isinstance(output, dict):
        for key, part in list(output.items()):
            output[key] = _cut(part, length, off)
    return output
