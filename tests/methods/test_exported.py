"""Every file of which docs/METHODS.md says that a task is one LoRA: peft and a plain model give the same."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import save_lora
from taskmoe.moe.collapse import collapse
from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.import_peft import import_peft
from taskmoe.train.models import build_model

TASKS = (0, 5)  # of eight


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
@torch.no_grad()
def test_a_task_in_other_hands(method, claims, shaken, tmp_path):
    if claims[method.name]["one LoRA a task"] != "yes":
        pytest.skip("is no LoRA")
    peft = pytest.importorskip("peft")
    model = shaken(method.build()).eval()
    table = method.data.bundle.tasks

    def base():
        return build_model(method.config, method.data.tokenizer, table)

    inputs = example_inputs(model.base_model)
    for task in TASKS:
        folder = tmp_path / table[task].slug
        save_lora(model, task, folder)
        expected = model(**inputs, task_ids=torch.full((3,), task)).logits
        found = {
            "peft": peft.PeftModel.from_pretrained(base(), folder).eval()(**inputs).logits,
            "merged": model.merge_and_unload(task)(**inputs).logits,
        }
        imported = import_peft(base(), [folder]).eval()
        found["imported"] = imported(**inputs, task_ids=[table[task].slug] * 3).logits
        for name, logits in found.items():
            error = float((logits - expected).abs().max())
            assert error <= 1e-5 * float(expected.abs().max()), (name, error)
        without = base()(**inputs).logits
        assert float((without - expected).abs().max()) > 1e-3 * float(expected.abs().max())
        for name, pair in collapse(imported, 0).items():
            own = collapse(model, task)[name]
            assert torch.equal(pair.A_RK[: len(own.A_RK)], own.A_RK), name
            assert torch.equal(pair.B_RN[: len(own.B_RN)], own.B_RN), name
