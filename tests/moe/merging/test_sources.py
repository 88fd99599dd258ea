"""What is merged out of a model: the logits of the model say what each LoRA is."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import CollapseError, TaskMoEConfig, attach
from taskmoe.moe.merge_weights import merge
from taskmoe.moe.merging.kinds import merge_loras
from taskmoe.moe.merging.sources import of_experts, of_tasks

FORMS = {
    "after": {},
    "before": {"compose": "before", "lora_alpha": 5.0},
    "heads": {"compose": "before", "num_heads": 4},
    "shared": {"bank": "shared_a"},
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_an_expert_is_what_a_task_with_it_alone_uses(form, tiny, shaken, batch, close) -> None:
    settings = {"r": 2, "num_experts": 3, "router": "fixed", "gate": "raw", **FORMS[form]}
    settings["router_options"] = {"experts": {"a": 0, "b": 2}}
    if form == "heads":
        settings |= {"router": "task_table", "gate": "one_hot", "router_options": None}
    model = shaken(attach(tiny("llama"), TaskMoEConfig.from_dict(settings), ["a", "b"])).eval()
    experts = of_experts(model)
    assert list(experts) == ["expert 0", "expert 1", "expert 2"]
    for number, expert in ((0, 0), (1, 2)):
        if form == "heads":
            model.routing.router.logits_STHE.fill_(-1.0)[..., expert] = 1.0
        inputs = batch("llama", [number] * 2)
        expected = model(**inputs).logits
        inputs.pop("task_ids")
        close(merge(model, number, experts[f"expert {expert}"])(**inputs).logits, expected, 1e-5)


@torch.no_grad()
def test_the_mean_of_experts_is_what_equal_gates_compute(tiny, shaken, batch, close) -> None:
    config = TaskMoEConfig(r=2, num_experts=3, router="none", gate="uniform")
    model = shaken(attach(tiny("gpt2"), config, ["a"])).eval()
    found = merge_loras(list(of_experts(model).values()), "concatenation")
    assert found.rank == 6
    inputs = batch("gpt2", [0, 0])
    expected = model(**inputs).logits
    inputs.pop("task_ids")
    close(merge(model, 0, found.pairs)(**inputs).logits, expected, 1e-5)


@torch.no_grad()
def test_tasks_that_share_experts_need_no_more_rank_than_these(routed) -> None:
    tasks = of_tasks(routed("llama"))
    assert list(tasks) == ["sort", "sum", "translate"] and list(of_tasks(routed("llama"), ["sum"])) == ["sum"]
    assert merge_loras(list(tasks.values()), "task_arithmetic").rank == 6  # of 3 tasks x 3 experts x 2


def test_experts_of_tokens_are_loras_too(tiny) -> None:
    model = attach(tiny("llama"), TaskMoEConfig(r=2, num_experts=3, router="token_linear"), ["a"])
    assert len(of_experts(model)) == 3
    with pytest.raises(CollapseError, match="gives each token gates of its own"):
        of_tasks(model)


@pytest.mark.parametrize(
    "settings",
    [{"bank": "mtl_lora"}, {"bank": "module", "bank_options": {"of": "ffn"}}, {"bank": "prompt"},
     {"bank": "mix_and_match", "num_experts": 4}],
)  # fmt: skip
def test_experts_that_are_no_loras(settings, tiny) -> None:
    model = attach(tiny("llama"), TaskMoEConfig.from_dict({"r": 2, "num_experts": 2, **settings}), ["a"])
    with pytest.raises(CollapseError, match=f"moe.bank: '{settings['bank']}' has no experts that are LoRAs"):
        of_experts(model)
