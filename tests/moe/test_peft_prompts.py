"""The same numbers in both: prompts here give what peft's prompt tuning, MPT and prefix tuning give.

peft's prompts are one a model, or one a task in MPT; its logits cover the prompt's positions too. The factors
of MPT start around zero there, at one here. Prefix tuning there refuses activation checkpointing.
"""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import TaskMoEConfig, attach

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
LENGTH, ROWS = 3, [2, 0, 1, 0]


def ours(tiny, shaken, kind, bank, where="input"):
    options = {"length": LENGTH, "where": where}
    return shaken(attach(tiny(kind), TaskMoEConfig(bank=bank, bank_options=options), 3)).eval()


def compare(model, theirs, inputs, off, pairs, gradients, close, task_ids=None):
    """Logits of the text, and the gradients of ``pairs`` (our tensor's name, theirs, how ours reads it)."""
    found = model(**inputs).logits
    rest = {n: v for n, v in inputs.items() if n != "task_ids"}
    if task_ids is not None:
        rest["task_ids"] = task_ids
    expected = theirs(**rest).logits[:, off:]
    close(found, expected)
    weights = torch.randn_like(found)
    (expected * weights).sum().backward()
    mine = gradients(model, (found * weights).sum())
    for name, tensor, read in pairs:
        close(read(mine[f"prompts.bank.{name}"]), tensor.grad, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_tuning(kind, tiny, batch, shaken, gradients, close):
    model = ours(tiny, shaken, kind, "prompt")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(tiny(kind), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(model.prompts.bank.prompts_TlW[1])
    inputs = batch(kind, [1, 1, 1])
    pairs = [("prompts_TlW", weight, lambda g: g[1])]
    compare(model, theirs, inputs, LENGTH, pairs, gradients, close)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_multitask_prompts(kind, tiny, batch, shaken, gradients, close):
    model = ours(tiny, shaken, kind, "multitask_prompt")
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_tasks=3, prompt_tuning_init="RANDOM"
    )
    theirs = peft.get_peft_model(tiny(kind), config).eval()
    encoder, bank = theirs.prompt_encoder["default"], model.prompts.bank
    with torch.no_grad():
        encoder.embedding.weight.copy_(bank.shared_lW)
        encoder.prefix_task_cols.copy_(bank.rows_Tl.unsqueeze(2))
        encoder.prefix_task_rows.copy_(bank.columns_TW.unsqueeze(1))
    pairs = [
        ("shared_lW", encoder.embedding.weight, lambda g: g),
        ("rows_Tl", encoder.prefix_task_cols, lambda g: g.unsqueeze(2)),
        ("columns_TW", encoder.prefix_task_rows, lambda g: g.unsqueeze(1)),
    ]
    inputs = batch(kind, ROWS)
    compare(model, theirs, inputs, LENGTH, pairs, gradients, close, inputs["task_ids"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefix_tuning(kind, tiny, batch, shaken, gradients, close):
    model = ours(tiny, shaken, kind, "prompt", "layers")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(tiny(kind), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(model.prompts.bank.prompts_TlW[1])
    inputs = batch(kind, [1, 1, 1])
    pairs = [("prompts_TlW", weight, lambda g: g[1])]
    compare(model, theirs, inputs, 0, pairs, gradients, close)
