"""Kinds of experts by name (see ``moe/banks/base.py`` for what a kind is)."""

from __future__ import annotations

from typing import Any

from taskmoe.moe.banks.adapter import Adapters
from taskmoe.moe.banks.fusion import Fusion
from taskmoe.moe.banks.generated import Generated
from taskmoe.moe.banks.imported import Imported
from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.banks.mix_and_match import MixAndMatchBank
from taskmoe.moe.banks.module.kind import Module
from taskmoe.moe.banks.mtl_lora import MtlLoraBank
from taskmoe.moe.banks.on_linears import OnLinears
from taskmoe.moe.banks.own_keys import OwnKeysBank
from taskmoe.moe.banks.prompt.kind import PromptKind
from taskmoe.moe.banks.prompt.multitask import MultitaskPrompts
from taskmoe.moe.banks.prompt.per_task import PerTaskPrompts
from taskmoe.moe.banks.prompt.retrieved import RetrievedPrompts
from taskmoe.moe.banks.shared_a import SharedABank

BANKS: dict[str, Any] = {
    "low_rank": OnLinears(LowRankBank),
    "shared_a": OnLinears(SharedABank),
    "mix_and_match": OnLinears(MixAndMatchBank),
    "mtl_lora": OnLinears(MtlLoraBank),
    "own_keys": OnLinears(OwnKeysBank),
    "imported": Imported,
    "adapter": Adapters,
    "generated": Generated,
    "fusion": Fusion,
    "module": Module,
    "prompt": PromptKind(PerTaskPrompts),
    "multitask_prompt": PromptKind(MultitaskPrompts),
    "prompt_bank": PromptKind(RetrievedPrompts),
}
