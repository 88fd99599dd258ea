"""Kinds of experts by name (see ``moe/banks/base.py`` for what a kind is)."""

from __future__ import annotations

from typing import Any

from taskmoe.moe.banks.adapter import Adapters
from taskmoe.moe.banks.fusion import Fusion
from taskmoe.moe.banks.generated import Generated
from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.banks.module.kind import Module
from taskmoe.moe.banks.on_linears import OnLinears
from taskmoe.moe.banks.prompt.kind import PromptKind
from taskmoe.moe.banks.prompt.multitask import MultitaskPrompts
from taskmoe.moe.banks.prompt.per_task import PerTaskPrompts
from taskmoe.moe.banks.prompt.retrieved import RetrievedPrompts

BANKS: dict[str, Any] = {
    "low_rank": OnLinears(LowRankBank),
    "adapter": Adapters,
    "generated": Generated,
    "fusion": Fusion,
    "module": Module,
    "prompt": PromptKind(PerTaskPrompts),
    "multitask_prompt": PromptKind(MultitaskPrompts),
    "prompt_bank": PromptKind(RetrievedPrompts),
}
