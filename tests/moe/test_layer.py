"""The routed model against dense ones: each task's experts merged into the weights, by code of the tests."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from transformers import BertForSequenceClassification

from taskmoe.moe import TaskMoEConfig, TaskTable, attach, attach_heads

METHODS = {
    "softmax-after": {"router_temperature": 0.7, "lora_alpha": 3.0},
    "sigmoid-after": {"gate": "sigmoid"},
    "top_k-after": {"gate": "top_k", "top_k": 2, "lora_alpha": 1.0},
    "one_hot-after": {"gate": "one_hot"},
    "uniform-after": {"gate": "uniform", "router": "none"},
    "mlp-after": {"router": "task_mlp", "task_embedding_dim": 5, "router_hidden_dim": 4},
    "scope-layer": {"router_scope": "layer"},
    "ranks": {"rank_pattern": {"q_proj": 3, "c_attn": 3, "wi_0": 3, "query": 3}, "lora_alpha": 2.0},
    "softmax-before": {"compose": "before", "router_temperature": 2.0, "lora_alpha": 3.0},
    "top_k-before": {"compose": "before", "gate": "top_k", "top_k": 2},
    "poly": {"compose": "before", "gate": "sigmoid", "lora_alpha": 1.0},
    "mhr": {"compose": "before", "gate": "sigmoid", "lora_alpha": 1.0, "num_heads": 4},
    "linear-gumbel": {"router": "task_linear", "gate": "gumbel", "router_temperature": 0.7},
    "shared-mlp-gumbel-one-hot": {
        "router": "shared_mlp", "gate": "gumbel_one_hot", "task_embedding_dim": 5, "router_hidden_dim": 4,
        "router_scope": "layer",
    },
    "fixed": {"router": "fixed", "gate": "raw", "router_options": {"experts": {"sort": 1, "*": 2}}},
    "random-tasks": {"router": "random_tasks", "gate": "raw", "router_options": {"experts": 2}},
    "raw": {"router": "task_linear", "gate": "raw", "task_embedding_dim": 5},
    "poly-noise": {"compose": "before", "gate": "bernoulli", "router_temperature": 0.7},
    "mhr-noise-shared": {
        "compose": "before", "gate": "bernoulli", "num_heads": 4, "gate_options": {"shared": True}
    },
    "poly-rounded": {"compose": "before", "gate": "bernoulli", "gate_options": {"straight_through": True}},
    "poly-l2": {"compose": "before", "gate": "sigmoid", "gate_options": {"normalise": "l2"}},
    "mhr-mlp": {"compose": "before", "num_heads": 2, "router": "task_mlp", "task_embedding_dim": 5},
}
TASKS = [2, 0, 1, 0]


def compare(model, plain, inputs, head, merged, gradients, close, heads=lambda task: {}):
    """Forward and every gradient of the routed model against one dense model a task, in double precision."""
    model, plain = model.double(), plain.double()
    out = head(model(**inputs, task_ids=TASKS))
    weights = torch.randn_like(out.masked_fill(out.isinf(), 0.0))
    found = gradients(model, (out.masked_fill(out.isinf(), 0.0) * weights).sum())
    rows = []
    for i, task in enumerate(TASKS):
        tensors = {**merged(model, task), **heads(task)}
        rows.append(
            head(functional_call(plain, tensors, kwargs={n: v[i : i + 1] for n, v in inputs.items()}))
        )
    dense = torch.cat(rows)
    beyond = out.isinf()
    close(out.masked_fill(beyond, 0.0), dense.masked_fill(beyond, 0.0), 1e-12)
    close(found, gradients(model, (dense.masked_fill(beyond, 0.0) * weights).sum()), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_formula(method, tiny, batch, routed, head, merged, gradients, close):
    inputs = batch("llama", TASKS)
    inputs.pop("task_ids")
    settings = {n: v for n, v in METHODS[method].items() if n != "rank_pattern"}
    if method == "ranks":
        settings["rank_pattern"] = {"q_proj": 3}
    model = routed("llama", **settings)
    model.train(model.routing.gate.noisy)  # no dropout in it
    model.routing.step = 4
    compare(model, tiny("llama").eval(), inputs, head, merged, gradients, close)


@pytest.mark.parametrize("compose", ["after", "before"])
def test_every_architecture_is_the_formula(
    kind, compose, tiny, batch, routed, head, merged, gradients, close
):
    inputs = batch(kind, TASKS)
    inputs.pop("task_ids")
    pattern = {"llama": "q_proj", "gpt2": "c_attn", "t5": "wi_0", "bert": "query"}[kind]
    model = routed(kind, compose=compose, lora_alpha=3.0, rank_pattern={pattern: 3})
    compare(model, tiny(kind).eval(), inputs, head, merged, gradients, close)


def test_a_model_with_heads_is_the_formula(tiny, batch, shaken, head, merged, gradients, close):
    table = TaskTable()
    for name, labels in (("two", "ab"), ("four", "abcd"), ("three", "abc")):
        table.add(name, list(labels))
    config = tiny("bert").config
    config.num_labels = 4

    def build():
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()

    model = attach(
        attach_heads(build(), table), TaskMoEConfig(r=2, num_experts=3, router_init_std=0.5), table
    )
    stacked = shaken(model).eval().base_model.classifier
    inputs = batch("bert", TASKS)
    inputs.pop("task_ids")

    def heads(task):
        return {"classifier.weight": stacked.weight_TNK[task], "classifier.bias": stacked.bias_TN[task]}

    compare(model, build(), inputs, head, merged, gradients, close, heads)


def test_dropout_acts_on_what_the_experts_read_alone(tiny, batch, shaken, head):
    config = TaskMoEConfig(r=2, num_experts=3, lora_dropout=0.5, target_modules=("down_proj",))
    model, inputs = attach(tiny("llama"), config, 3, dry_run=False), batch("llama", [0, 1])
    evaluated = head(model.eval()(**inputs))
    assert torch.equal(head(model.train()(**inputs)), evaluated), "B is zero: dropout must not reach the base"
    shaken(model)
    assert not torch.equal(head(model(**inputs)), head(model(**inputs)))
    model.eval()
    assert torch.equal(head(model(**inputs)), head(model(**inputs)))


def test_half_precision_bases_keep_their_dtype_and_experts_theirs(
    tiny, batch, shaken, head, gradients, close
):
    model, inputs = (
        shaken(attach(tiny("llama").bfloat16(), TaskMoEConfig(r=2, num_experts=3), 3)),
        batch("llama", [0, 1]),
    )
    whole = shaken(attach(tiny("llama"), TaskMoEConfig(r=2, num_experts=3), 3))
    out = head(model(**inputs))
    assert out.dtype == torch.bfloat16
    close(out.float(), head(whole(**inputs)), 5e-2)
    found = gradients(model, out.float().square().sum())
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(g.isfinite().all() and g.any() for g in found.values())
