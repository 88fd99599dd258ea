"""attach(): the exact list of what trains, every refusal, bases of other kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskmoe.moe import ConfigError, TaskError, TaskMoEConfig, TaskTable, attach, attach_heads
from taskmoe.moe.layer import MoELinear

CONFIG = TaskMoEConfig(r=2, num_experts=3)
MLP = tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LINEARS = {
    "llama": [
        f"model.layers.{i}.{m}" for i in range(2) for m in (*(f"self_attn.{p}_proj" for p in "qkvo"), *MLP)
    ],
    "gpt2": [f"transformer.h.{i}.{m}" for i in range(2) for m in GPT2],
    "t5": [
        *(f"encoder.block.{i}.layer.0.SelfAttention.{p}" for i in range(2) for p in "qkvo"),
        *(f"encoder.block.{i}.layer.1.DenseReluDense.{p}" for i in range(2) for p in ("wi_0", "wi_1", "wo")),
        *(f"decoder.block.{i}.layer.0.SelfAttention.{p}" for i in range(2) for p in "qkvo"),
        *(f"decoder.block.{i}.layer.1.EncDecAttention.{p}" for i in range(2) for p in "qkvo"),
        *(f"decoder.block.{i}.layer.2.DenseReluDense.{p}" for i in range(2) for p in ("wi_0", "wi_1", "wo")),
    ],
    "bert": [
        *(f"encoder.layer.{i}.attention.self.{p}" for i in range(2) for p in ("query", "key", "value")),
        *(f"encoder.layer.{i}.{p}" for i in range(2)
          for p in ("attention.output.dense", "intermediate.dense", "output.dense")),
        "pooler.dense",
    ],
}  # fmt: skip


def test_the_exact_list_of_what_trains(kind, tiny):
    names = [n for n, _ in tiny(kind).named_parameters()]
    model = attach(tiny(kind), CONFIG, 3)
    assert model.not_run == []
    expected = {f"base_model.{n}.bank.{p}" for n in LINEARS[kind] for p in ("A_ErK", "B_ErN")}
    assert set(model.trainable_names()) == expected | {"routing.router.logits_STHE"}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    moved = {n: n.replace(t, f"{t}.base") for n in names for t in LINEARS[kind] if n.startswith(t + ".")}
    assert frozen == {"base_model." + moved.get(n, n) for n in names}


def test_the_list_with_an_mlp_router_saved_modules_and_heads(tiny):
    table = TaskTable()
    table.add("a", ["x", "y"])
    table.add("b", ["x", "y", "z"])
    config = TaskMoEConfig(
        r=2, num_experts=3, router="task_mlp", target_modules=("query",), modules_to_save=("pooler",)
    )
    model = attach(attach_heads(tiny("bert"), table, "mean"), config, table, dry_run=False)
    queries = [f"base_model.encoder.encoder.layer.{i}.attention.self.query.bank" for i in range(2)]
    assert set(model.trainable_names()) == {
        *(f"{q}.{p}" for q in queries for p in ("A_ErK", "B_ErN")),
        "routing.representation.embedding_TD",
        *(f"routing.router.{p}" for p in ("w1_SDF", "b1_SF", "w2_SFE", "b2_SE")),
        "base_model.encoder.pooler.saved.dense.weight",
        "base_model.encoder.pooler.saved.dense.bias",
        "base_model.classifier.weight_TNK",
        "base_model.classifier.bias_TN",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "table"}, r"moe\.router: 'table' is unknown; known are .*; the nearest is 'task_table'"),
        (
            {"gate": "soft"},
            r"moe\.gate: 'soft' is unknown; known are .*softmax.*; the nearest is 'softmax'",
        ),
        (
            {"router_scope": "block"},
            r"moe\.router_scope: 'block' is unknown; known are linear, layer, stack, model",
        ),
        ({"compose": "both"}, r"moe\.compose: 'both' is unknown; known are after, before"),
        ({"new_task_rows": "one"}, r"moe\.new_task_rows: 'one' is unknown; known are mean, zero, random"),
        ({"r": 0}, r"moe\.r: 0 must be a whole number, at least 1"),
        ({"r": 2.5}, r"moe\.r: 2\.5 must be a whole number"),
        ({"r": "4"}, r"moe\.r: '4' must be a whole number"),
        ({"num_experts": -1}, r"moe\.num_experts: -1 must"),
        ({"num_heads": 0}, r"moe\.num_heads: 0 must"),
        ({"task_embedding_dim": 0}, r"moe\.task_embedding_dim: 0 must"),
        ({"router_hidden_dim": 0}, r"moe\.router_hidden_dim: 0 must"),
        ({"lora_alpha": 0.0}, r"moe\.lora_alpha: 0\.0 must be above 0"),
        ({"lora_alpha": float("nan")}, r"moe\.lora_alpha: nan must be above 0"),
        ({"num_heads": 2}, r"moe\.num_heads: 2 needs compose: before"),
        ({"num_heads": 3, "compose": "before"}, r"moe\.num_heads: 3 does not divide 16 x 16 of .*q_proj"),
        ({"router_temperature": 0.0}, r"moe\.router_temperature: 0\.0 must be above 0"),
        ({"lora_dropout": 1.0}, r"moe\.lora_dropout: 1\.0 must be in \[0, 1\)"),
        ({"lora_dropout": -0.1}, r"moe\.lora_dropout: -0\.1 must be in"),
        ({"gate": "top_k"}, r"moe\.top_k: None with gate 'top_k'; set both"),
        ({"top_k": 2}, r"moe\.top_k: 2 with gate 'softmax'; set both gate: top_k and top_k, or neither"),
        ({"gate": "top_k", "top_k": 1}, r"moe\.top_k: 1 must be between 2 and num_experts = 3 .*one_hot"),
        ({"gate": "top_k", "top_k": 4}, r"moe\.top_k: 4 must be between 2 and num_experts = 3"),
        (
            {"router": "none"},
            r"moe\.router: 'none' with gate 'softmax'; router: none goes with gate: uniform",
        ),
        ({"gate": "uniform"}, r"moe\.router: 'task_table' with gate 'uniform'"),
    ],
)
def test_settings_that_contradict_each_other(settings, message, tiny):
    model = tiny("llama")
    with pytest.raises(ConfigError, match=message):
        attach(model, TaskMoEConfig.from_dict({"r": 2, "num_experts": 3, **settings}), 2)
    assert all(p.requires_grad for p in model.parameters()), "an error leaves the model as it was"
    assert not any(isinstance(m, MoELinear) for m in model.modules())


def test_tables_of_tasks_that_cannot_be_used(tiny):
    with pytest.raises(ConfigError, match="the table is empty"):
        attach(tiny("llama"), CONFIG, [])
    with pytest.raises(ConfigError, match="the table is empty"):
        attach(tiny("llama"), CONFIG, 0)
    with pytest.raises(TaskError, match="'a' is in the table twice"):
        attach(tiny("llama"), CONFIG, ["a", "a"])
    with pytest.raises(TaskError, match="one string"):
        attach(tiny("llama"), CONFIG, "qa")


def test_attaching_twice_is_refused(tiny):
    model = attach(tiny("llama"), CONFIG, 2, dry_run=False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM carries experts already"):
        attach(model.base_model, CONFIG, 2)
    with pytest.raises(ConfigError, match="carries experts already"):
        attach(model, CONFIG, 2)


def test_a_head_per_task_is_not_saved_whole(tiny):
    table = TaskTable()
    table.add("a", ["x", "y"])
    base = attach_heads(tiny("bert"), table, "mean")
    with pytest.raises(ConfigError, match="classifier is a head per task, which trains anyway"):
        attach(base, TaskMoEConfig(modules_to_save=("classifier",)), table)


class Int8Linear(nn.Module):
    """A quantised linear as libraries make them: integer weights, a scale, no parameter that could train."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_a_quantised_base_is_y_plus_delta(tiny, batch, head, shaken, reading, gradients, close):
    def quantised():
        model = tiny("llama")
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
        return model

    inputs = batch("llama", [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(quantised()(**inputs))
    model = attach(quantised(), CONFIG, 3)
    inputs["task_ids"] = tasks
    assert model.trainable_names() == attach(tiny("llama"), CONFIG, 3).trainable_names()
    assert torch.equal(head(model(**inputs)), expected)
    found = gradients(shaken(model), reading(model, inputs)[1])
    assert all(g.isfinite().all() and g.any() for g in found.values())
    float_base = shaken(attach(tiny("llama"), CONFIG, 3))
    close(head(model(**inputs)), head(float_base(**inputs)), 0.05)


def test_lora_alpha_over_r_is_the_scale(tiny):
    def scales(**settings):
        model = attach(tiny("llama"), TaskMoEConfig(num_experts=2, **settings), 2, dry_run=False)
        return {m.name.rpartition(".")[2]: m.bank.scale for m in model.modules() if isinstance(m, MoELinear)}

    assert set(scales(r=4).values()) == {1.0}
    assert set(scales(r=4, lora_alpha=16.0).values()) == {4.0}
    mixed = scales(r=4, lora_alpha=16.0, rank_pattern={"q_proj": 8})
    assert mixed["q_proj"] == 2.0
    assert mixed["v_proj"] == 4.0


def test_experts_are_float32_on_the_device_of_their_base(tiny):
    model = attach(tiny("llama").bfloat16(), CONFIG, 2)
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not p.requires_grad} == {torch.bfloat16}


def test_saved_modules_train_beside_their_original(tiny, batch, head, shaken, gradients, reading):
    config = TaskMoEConfig(
        r=2, num_experts=3, target_modules=("q_proj",), modules_to_save=("lm_head", "norm", "embed_tokens")
    )
    inputs = batch("llama", [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(tiny("llama")(**inputs))
    model = attach(tiny("llama"), config, 3)
    inputs["task_ids"] = tasks
    saved = [n for n, _ in model.trainable_groups()["saved"]]
    assert saved == [f"base_model.{n}.saved.weight" for n in ("model.embed_tokens", "model.norm", "lm_head")]
    assert torch.equal(head(model(**inputs)), expected)
    found = gradients(model, reading(model, inputs)[1])
    assert all(found[n].any() for n in saved)
    shaken(model)
    assert not torch.allclose(head(model(**inputs)), expected)
    with model.disable_adapter():
        assert torch.equal(head(model(**inputs)), expected)
