"""Surgery runs the routers once more, with the same noise: each task's gradient is that of its own rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, attach
from taskmoe.train.task_gradients import TaskGradients

NAMES, TASKS = ["sort", "sum", "translate", "copy"], [2, 0, 1, 0, 2, 2]
LAYERS = {"router_scope": "layer", "task_embedding_dim": 4, "router_hidden_dim": 8}
POLY = {**LAYERS, "router": "task_mlp", "compose": "before", "gate": "bernoulli"}
ROUTERS: dict[str, dict[str, Any]] = {
    "linear, gumbel": {"router": "task_linear", "gate": "gumbel", "task_embedding_dim": 4},
    "linear, raw": {"router": "task_linear", "gate": "raw", "task_embedding_dim": 4},
    "shared mlp, gumbel one-hot": {**LAYERS, "router": "shared_mlp", "gate": "gumbel_one_hot"},
    "rnn": {**LAYERS, "router": "recurrent", "router_options": {"cell": "rnn", "bidirectional": False}},
    "gru, gumbel one-hot": {**LAYERS, "router": "recurrent", "gate": "gumbel_one_hot"},
    "lstm, gumbel": {**LAYERS, "router": "recurrent", "router_options": {"cell": "lstm"}, "gate": "gumbel"},
    "transformer, gumbel": {**LAYERS, "router": "transformer", "gate": "gumbel"},
    "bernoulli": {**POLY, "num_heads": 2, "gate_options": {"dropout": 0.2, "shared": True}},
    "bernoulli, rounded": {**POLY, "gate_options": {"straight_through": True}},
    "l2": {**POLY, "gate": "sigmoid", "gate_options": {"normalise": "l2"}},
    "fixed": {"router": "fixed", "gate": "raw", "router_options": {"experts": {"s*": 0, "*": 2}}},
    "random tasks": {"router": "random_tasks", "gate": "raw"},
}


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    model = attach(LlamaForCausalLM(llama), TaskMoEConfig(r=2, num_experts=3, **settings), NAMES)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * 0.3)
    model.routing.seed, model.routing.step = 3, 7
    return model.double().train()


def loss(model: Any, tasks: list[int], rows: list[int]) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 29, (len(TASKS), 7), generator=draw)[rows]
    weights = torch.randn(len(TASKS), 7, 29, generator=draw, dtype=torch.float64)[rows]
    return (model(input_ids=ids, task_ids=tasks).logits * weights).sum()


def of_each_task(model: Any) -> dict[int, dict[str, Tensor]]:
    """{task: {name: gradient}}, a backward pass for each task's rows alone."""
    found = {}
    for task in sorted(set(TASKS)):
        rows = [i for i, t in enumerate(TASKS) if t == task]
        loss(model, [task] * len(rows), rows).backward()
        found[task] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    return found


def collected(model: Any) -> TaskGradients:
    gradients = TaskGradients(model)
    assert gradients.way == "fused"
    with gradients:
        loss(model, TASKS, list(range(len(TASKS)))).backward()
    gradients.matrix.reduce()
    gradients._route()
    return gradients


def check(model: Any, expected: dict[int, dict[str, Tensor]]) -> TaskGradients:
    gradients = collected(model)
    for row, (task,) in enumerate(gradients.row_tasks()):
        for name in gradients.scope.shared:
            part, whole = gradients.matrix.block(name)[row], expected[task][name].flatten()
            bound = 1e-12 * max(1.0, float(whole.abs().max()))
            assert float((part - whole).abs().max()) <= bound, (task, name)
    return gradients


@pytest.mark.parametrize("router", ROUTERS)
def test_the_parts_are_each_tasks_own_gradient(router: str) -> None:
    model = build(**ROUTERS[router])
    gradients = check(model, of_each_task(model))
    shared = [n for n in gradients.scope.shared if n.startswith("routing.router")]
    assert bool(shared) == getattr(type(model.routing.router), "trains", True)


@pytest.mark.parametrize("router", [n for n in ROUTERS if "gumbel" in n or n == "bernoulli"])
def test_the_noise_has_a_part_in_it(router: str) -> None:
    model = build(**ROUTERS[router])
    noisy = of_each_task(model)
    model.routing.step += 1
    other = of_each_task(model)
    names = [n for n in noisy[0] if n.startswith("routing.router")]
    assert any(not torch.allclose(noisy[0][n], other[0][n]) for n in names)


def test_frozen_vectors_are_the_models_whatever_becomes_of_the_file(tmp_path) -> None:
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps({n: [float(i), 1.0, i * i - 2.0] for i, n in enumerate(NAMES)}))
    options = {"path": str(path), "normalise": True}
    model = build(router="task_linear", representation="frozen", representation_options=options)
    expected = of_each_task(model)
    check(model, expected)
    path.unlink()
    model.zero_grad()
    expected = of_each_task(model)
    gradients = check(model, expected)
    assert not any("representation" in n for n in gradients.scope.shared)
