"""One vector a text: pooling by hand, padding that changes nothing, experts inside."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.text_encoder import TextEncoder

TASKS = ["a", "b", "c"]


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_vectors_by_hand(pooling, tiny, batch, close):
    encoder = tiny("bert").double().eval()
    inputs = batch("bert", [0, 1, 2])
    inputs.pop("task_ids")
    inputs["attention_mask"][1, 5:] = 0
    hidden = encoder(**inputs).last_hidden_state
    rows = []
    for b, mask in enumerate(inputs["attention_mask"]):
        row = hidden[b, mask.bool()].mean(0) if pooling == "mean" else hidden[b, 0]
        rows.append(row)
    plain = torch.stack(rows)
    close(TextEncoder(encoder, pooling, False, 1.0)(**inputs).logits, plain, 1e-12)
    unit = plain / plain.square().sum(1, keepdim=True).sqrt()
    close(TextEncoder(encoder, pooling, True, 5.0)(**inputs).logits, 5 * unit, 1e-12)


def test_padding_changes_nothing(tiny, batch, close):
    model = TextEncoder(tiny("bert").double().eval(), "mean", True)
    inputs = batch("bert", [0])
    inputs.pop("task_ids")
    longer = {n: torch.cat([v, torch.zeros(1, 4, dtype=v.dtype)], 1) for n, v in inputs.items()}
    close(model(**longer).logits, model(**inputs).logits, 1e-12)


def test_vectors_are_fp32_at_least(tiny, batch):
    inputs = batch("bert", [0])
    inputs.pop("task_ids")
    assert TextEncoder(tiny("bert").bfloat16(), "mean", True)(**inputs).logits.dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"bank": "module", "bank_options": {"of": "attention"}}], ids=str)
def test_experts_inside_follow_each_text(settings, tiny, batch, shaken, close):
    encoder = TextEncoder(tiny("bert"), "mean", True)
    config = TaskMoEConfig.from_dict({"num_experts": 3, "router_init_std": 0.5, **settings})
    model = shaken(attach(encoder, config, TASKS)).double().eval()
    inputs = batch("bert", [2, 0, 1])
    together = model(**inputs).logits
    for i in range(3):
        close(model(**{n: v[i : i + 1] for n, v in inputs.items()}).logits, together[i : i + 1], 1e-12)


def test_an_unknown_pooling_is_refused(tiny):
    with pytest.raises(ConfigError, match="pooling: 'max' is unknown; known are model, mean"):
        TextEncoder(tiny("bert"), "max", True)
