"""One task as a plain model: the logits of the mixture, from files that transformers reads by itself."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)

from taskmoe.moe import CollapseError, TaskError, TaskMoEConfig, attach, attach_heads
from taskmoe.moe.collapse import collapse
from taskmoe.moe.merge_weights import merge
from taskmoe.moe.tasks import TaskTable
from taskmoe.moe.truncate import truncate

FORMS = {
    "after": {},
    "before": {"compose": "before", "gate": "sigmoid", "lora_alpha": 5.0},
    "heads": {"compose": "before", "gate": "sigmoid", "num_heads": 4},
}


@pytest.fixture(scope="module")
def labelled():
    tasks = TaskTable()
    tasks.add("two", ["no", "yes"])
    tasks.add("three", ["a", "b", "c"])
    return tasks


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_merged_models_are_plain_and_read_again(kind, form, routed, tiny, batch, head, close, tmp_path):
    model = routed(kind, **FORMS[form])
    before = {n: p.clone() for n, p in model.named_parameters()}
    fresh = tiny(kind)
    for number, name in enumerate(model.tasks.names[:2]):
        merged = model.merge_and_unload(name)
        assert [type(m) for m in merged.modules()] == [type(m) for m in fresh.modules()]
        assert all(p.requires_grad for p in merged.parameters()) and not merged.training
        merged.save_pretrained(tmp_path / name)
        again = type(fresh).from_pretrained(tmp_path / name).eval()
        inputs = batch(kind, [number] * 3, seed=number)
        expected = head(model(**inputs))
        inputs.pop("task_ids")
        close(head(merged(**inputs)), expected, 1e-5)
        close(head(again(**inputs)), head(merged(**inputs)), 0.0)
        assert float((head(fresh.eval()(**inputs)) - expected).abs().max()) > 1e-2 * float(
            expected.abs().max()
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
def test_weights_that_are_shared_stay_shared_unless_experts_part_them(
    routed, tiny, batch, head, close, tmp_path
):
    """GPT-2 puts out with its embedding; with experts there, or when that is trained whole, no more."""
    for settings in ({"target_modules": ["c_attn"]}, {"target_modules": ["c_attn", "lm_head"]},
                     {"target_modules": ["c_attn"], "modules_to_save": ("lm_head",)}):  # fmt: skip
        model = routed("gpt2", **settings)
        merged = merge(model, "sum")
        parted = len(settings) > 1 or len(settings["target_modules"]) > 1
        assert (merged.lm_head.weight is merged.transformer.wte.weight) is not parted
        assert torch.equal(merged.transformer.wte.weight, tiny("gpt2").transformer.wte.weight)
        merged.save_pretrained(tmp_path)
        inputs = batch("gpt2", [1, 1])
        expected = head(model(**inputs))
        inputs.pop("task_ids")
        close(head(type(merged).from_pretrained(tmp_path).eval()(**inputs)), expected, 1e-5)


@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, UMT5ForConditionalGeneration])
@torch.no_grad()
def test_states_are_scaled_before_an_output_that_is_shared_no_more(cls, tiny, shaken, batch, close, tmp_path):
    base = cls(cls.config_class(**tiny("t5").config.to_dict()))
    config = TaskMoEConfig(r=2, num_experts=2, target_modules=("q", "lm_head"))
    model = shaken(attach(base, config, ["a", "b"])).eval()
    inputs = batch("t5", [1, 1])
    expected = model(**inputs).logits
    inputs.pop("task_ids")
    merged = merge(model, "b")
    assert merged.lm_head.weight is not merged.shared.weight
    close(merged(**inputs).logits, expected, 1e-5)
    merged.save_pretrained(tmp_path)
    close(cls.from_pretrained(tmp_path).eval()(**inputs).logits, expected, 1e-5)


@pytest.mark.parametrize("base", [BertForSequenceClassification, GPT2ForSequenceClassification])
@torch.no_grad()
def test_a_task_with_a_head_is_a_classifier_of_its_labels(
    base, labelled, tiny, shaken, batch, close, tmp_path
):
    kind = {"BertForSequenceClassification": "bert", "GPT2ForSequenceClassification": "gpt2"}[base.__name__]
    config = tiny(kind).config
    config.num_labels = 3
    model = attach(attach_heads(base(config), labelled), TaskMoEConfig(r=2, num_experts=2), labelled)
    shaken(model).eval()
    for number, task in enumerate(labelled):
        merge(model, number).save_pretrained(tmp_path / task.name)
        again = base.from_pretrained(tmp_path / task.name).eval()
        assert tuple(again.config.id2label.values()) == task.labels and again.num_labels == len(task.labels)
        inputs = batch(kind, [number] * 3)
        expected = model(**inputs).logits
        inputs.pop("task_ids")
        close(again(**inputs).logits, expected[:, : len(task.labels)], 1e-5)


@torch.no_grad()
def test_half_precision_rounds_once(tiny, shaken, close):
    model = shaken(attach(tiny("llama").bfloat16(), TaskMoEConfig(r=2, num_experts=2), ["a"])).eval()
    name, pair = next(iter(collapse(model, 0).items()))
    weight = model.base_model.get_submodule(name).base.weight
    found = merge(model, 0).get_submodule(name).weight
    assert torch.equal(found, (weight.float() + pair.B_RN.T @ pair.A_RK).bfloat16())


@torch.no_grad()
def test_other_pairs_in_place_of_the_tasks_own(routed):
    model = routed("llama")
    pairs, errors = truncate(collapse(model, 0), 1)
    name = max(errors, key=lambda n: errors[n])
    weight = model.base_model.get_submodule(name).base.weight
    found = merge(model, 0, pairs).get_submodule(name).weight
    torch.testing.assert_close(found - weight, pairs[name].B_RN.T @ pairs[name].A_RK, rtol=0, atol=1e-5)


@torch.no_grad()
def test_module_experts_merge_where_a_task_uses_one(tiny, shaken, batch, head, close):
    settings = {"num_experts": 3, "bank": "module", "bank_options": {"of": "ffn"}, "gate": "one_hot"}
    model = shaken(attach(tiny("llama"), TaskMoEConfig.from_dict(settings), ["a", "b"])).eval()
    inputs = batch("llama", [1, 1])
    expected = head(model(**inputs))
    inputs.pop("task_ids")
    close(head(merge(model, "b")(**inputs)), expected, 1e-6)
    mixed = attach(tiny("llama"), TaskMoEConfig.from_dict({**settings, "gate": "softmax"}), ["a"])
    with pytest.raises(CollapseError, match=r"task 'a' mixes copies of a module \(0.333, 0.333, 0.333\)"):
        merge(mixed, "a")


def test_what_cannot_be_merged_is_refused(tiny, routed):
    with pytest.raises(TaskError, match="unknown task 'sorting'; the nearest of 3 are sort"):
        merge(routed("llama"), "sorting")
    tokens = attach(tiny("llama"), TaskMoEConfig(router="token_linear"), ["a"])
    with pytest.raises(CollapseError, match="gives each token gates of its own"):
        tokens.merge_and_unload("a")
    model = routed("llama")
    linear = next(m for m in model.modules() if hasattr(m, "token_routing"))
    linear.base.weight = torch.nn.Parameter(linear.base.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(CollapseError, match=f"{linear.name}: its weight is quantised"):
        merge(model, "sum")
