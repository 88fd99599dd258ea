"""Routers: logits by hand, shapes, the axis of the tasks, the start."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.model import task_dims
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.tasks import TaskTable

GROUPS, TASKS, HEADS, EXPERTS, DIM = 3, 5, 2, 4, 6
CONFIG = TaskMoEConfig(num_experts=EXPERTS, num_heads=HEADS, router_hidden_dim=8)
OPTIONS = {"fixed": {"experts": {"task-[135]": 1, "*": 3}}, "random_tasks": {"experts": 2}}
VECTORS = torch.randn(TASKS, DIM, generator=torch.Generator().manual_seed(0))


def build(name, config=CONFIG, groups=GROUPS, num_tasks=TASKS, **options):
    tasks = TaskTable.from_names([f"task-{i}" for i in range(num_tasks)])
    config = replace(config, router=name, router_options=options or OPTIONS.get(name))
    return ROUTERS[name](config, [f"layers.{i}" for i in range(groups)], tasks, DIM)


@pytest.fixture(params=ROUTERS)
def router(request):
    return build(request.param)


def test_logits_of_the_tasks_asked_for(router):
    tasks = torch.tensor([4, 1])
    logits = router(tasks, VECTORS[tasks])
    assert logits.shape == (GROUPS, 2, HEADS, EXPERTS)
    everything = router(torch.arange(TASKS), VECTORS)
    assert torch.allclose(logits, everything[:, tasks], atol=1e-6)


def test_every_tensor_gets_a_gradient_whatever_the_tasks_are(router):
    logits = router(torch.tensor([3]), VECTORS[3:4])
    assert bool(list(router.parameters())) == getattr(type(router), "trains", True)
    if not list(router.parameters()):
        assert not logits.requires_grad
        return
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())


def test_the_task_axis_has_the_size_of_the_table(router):
    for name, axis in router.task_dims.items():
        assert getattr(router, name).shape[axis] == TASKS
    rest = {n for n, _ in router.named_parameters()} - set(router.task_dims)
    other = build(next(n for n, cls in ROUTERS.items() if type(router) is cls), num_tasks=TASKS + 1)
    for name in rest:
        assert getattr(other, name).shape == getattr(router, name).shape, (
            f"{name} depends on the number of tasks"
        )


def test_the_table_is_a_free_row_of_small_logits():
    torch.manual_seed(0)
    config = TaskMoEConfig(num_experts=50, router_init_std=0.01)
    table = build("task_table", config, 8, 20)
    assert torch.equal(table(torch.tensor([7, 2]), None), table.logits_STHE[:, [7, 2]])
    logits = table.logits_STHE.detach()
    assert float(logits.std()) == pytest.approx(0.01, rel=0.05)
    assert abs(float(logits.mean())) < 1e-3


def test_the_mlp_by_hand():
    router, vectors = build("task_mlp").double(), VECTORS.double()
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn_like(p))
        found = router(torch.tensor([2]), vectors[2:3])
        for s in range(GROUPS):
            hidden = [
                sum(float(vectors[2, d] * router.w1_SDF[s, d, f]) for d in range(DIM))
                + float(router.b1_SF[s, f])
                for f in range(8)
            ]
            hidden = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in hidden]
            for h in range(HEADS):
                for e in range(EXPERTS):
                    column = h * EXPERTS + e
                    logit = sum(hidden[f] * float(router.w2_SFE[s, f, column]) for f in range(8))
                    assert float(found[s, 0, h, e]) == pytest.approx(logit + float(router.b2_SE[s, column]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "fixed"}, "moe.gate: 'softmax' with router 'fixed', which goes with gate raw alone"),
        ({"router": "random_tasks", "gate": "top_k", "top_k": 2}, "moe.gate: 'top_k' with router 'random_ta"),
        (
            {"router": "random_tasks", "gate": "raw", "router_options": {"experts": 9}},
            "moe.router_options.experts: 9 must be between 1 and num_experts = 8",
        ),
        ({"router": "recurrent", "router_scope": "model"}, "moe.router_scope: 'model' makes one routing gr"),
        ({"router": "recurrent", "router_options": {"cell": "gr"}}, "moe.router_options.cell: 'gr' is unkn"),
        ({"router": "transformer", "router_options": {"heads": 3}}, "moe.router_options.heads: 3 does not"),
    ],
)
def test_routers_refuse_what_they_cannot_use(settings, message, tiny):
    with pytest.raises(ConfigError, match=message):
        attach(tiny("llama"), TaskMoEConfig(**settings), 3, dry_run=False)


def test_no_router_follows_the_models_dtype():
    router = build("none")
    assert router.double()(torch.tensor([0]), None).dtype == torch.float64
    assert not router.state_dict()


@pytest.mark.parametrize(
    ("kind", "scope", "groups"),
    [
        ("llama", "model", ["model"]),
        ("llama", "stack", ["model.layers"]),
        ("llama", "layer", ["model.layers.0", "model.layers.1"]),
        ("gpt2", "layer", ["transformer.h.0", "transformer.h.1"]),
        ("t5", "stack", ["encoder.block", "decoder.block"]),
        ("t5", "layer", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        ("bert", "layer", ["encoder.layer.0", "encoder.layer.1", "pooler"]),
        ("bert", "stack", ["encoder.layer", "pooler"]),
    ],
)
def test_scopes_share_one_routing(kind, scope, groups, tiny):
    model = attach(tiny(kind), TaskMoEConfig(r=1, num_experts=2, router_scope=scope), 3, dry_run=False)
    assert model.routing.groups == groups
    assert model.routing.router.logits_STHE.shape == (len(groups), 3, 1, 2)


def test_scope_linear_routes_every_linear(tiny):
    model = attach(tiny("llama"), TaskMoEConfig(r=1, num_experts=2), 3, dry_run=False)
    assert len(model.routing.groups) == 14
    assert len({m.group for m in model.modules() if hasattr(m, "bank")}) == 14


def test_parameters_with_a_task_axis_are_known_by_name(tiny):
    config = TaskMoEConfig(r=1, num_experts=2, router="task_mlp")
    model = attach(tiny("bert"), config, 3, dry_run=False)
    assert task_dims(model) == {"routing.representation.embedding_TD": 0}
