"""One backward pass gives each task's gradient on what prompts share, wherever they stand."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train.task_gradients import TaskGradients

TASKS = [2, 0, 1, 0, 2]
BANKS = {
    "multitask_prompt": {},
    "prompt_bank": {"router": "task_mlp", "num_experts": 3, "router_init_std": 0.5},
}


def build(bank: str, where: str, mode: str):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(
        vocab_size=29, n_embd=16, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=1, eos_token_id=2))  # fmt: skip
    options = {"bank": bank, "bank_options": {"length": 3, "where": where, "start_std": 0.5}, **BANKS[bank]}
    model = attach(base, TaskMoEConfig.from_dict(options), 4).double().train()
    if mode != "none":
        name = "activation_checkpointing_enable"
        enable = getattr(base, name) if hasattr(base, name) else base.gradient_checkpointing_enable
        enable({"use_reentrant": mode == "reentrant"})
    return model


@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("where", ["input", "layers"])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("way", ["fused", "separate"])
def test_rows_are_the_gradients_of_the_tasks(bank, where, mode, way):
    model = build(bank, where, mode)
    ids = torch.randint(3, 29, (len(TASKS), 7))
    weights = torch.randn(len(TASKS), 7, 29, dtype=torch.float64)
    expected = {}
    for task in range(3):
        rows = torch.tensor(TASKS) == task
        logits = model(input_ids=ids[rows], task_ids=[task] * int(rows.sum()), use_cache=False).logits
        (logits * weights[rows]).sum().backward()
        expected[task] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    grads = TaskGradients(model, way=way)
    with grads:
        losses = (model(input_ids=ids, task_ids=TASKS, use_cache=False).logits * weights).sum((1, 2))
        if way == "fused":
            losses.sum().backward()
        else:
            grads.backward({t: losses[torch.tensor(TASKS) == t].sum() for t in range(3)})
    grads.matrix.reduce()
    if way == "fused":
        grads._route()
    order = [tasks[0] for tasks in grads.row_tasks()]
    assert sorted(order) == [0, 1, 2] and grads.scope.shared
    for name in grads.scope.shared:
        wanted = torch.stack([expected[t][name].flatten() for t in order])
        assert wanted.any()
        assert (grads.matrix.block(name) - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name
