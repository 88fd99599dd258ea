"""Routes that are given or drawn, not learned."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, attach
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.tasks import TaskTable

GROUPS, TASKS, HEADS, EXPERTS = 3, 5, 2, 4


def build(name, num_tasks=TASKS, **options):
    tasks = TaskTable.from_names([f"task-{i}" for i in range(num_tasks)])
    config = TaskMoEConfig(num_experts=EXPERTS, num_heads=HEADS, router=name, router_options=options)
    return ROUTERS[name](config, [f"layers.{i}" for i in range(GROUPS)], tasks, 0)


def test_the_fixed_router_by_pattern_and_by_group():
    router = build("fixed", experts={"task-[135]": 1, "*": 3})
    route = torch.eye(EXPERTS)[[3, 1, 3, 1, 3]]
    found = router(torch.tensor([4, 1]), None)
    assert torch.equal(found, route[[4, 1]][None, :, None].expand(GROUPS, 2, HEADS, EXPERTS))
    table = TaskTable()
    for name, group in (("a", "search"), ("b", "links"), ("c", "search"), ("d", "classes")):
        table.add(name, group=group)
    config = TaskMoEConfig(num_experts=3, router="fixed", gate="raw")
    by_group = ROUTERS["fixed"](config, ["model"], table, 0)
    assert by_group(torch.arange(4), None)[0, :, 0].argmax(-1).tolist() == [0, 1, 0, 2]
    assert not by_group.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "moe.router_options.experts: none given, and task 'sort' is in no group"),
        ({"experts": {"so*": 0, "sum": 1}}, r"moe.router_options.experts: so\*, sum: none matches task"),
        (
            {"experts": {"sotr": 0, "*": 1}},
            "moe.router_options.experts: 'sotr' matches no task; the nearest of 3 is 'sort'",
        ),
        ({"experts": {"*": 3}}, r"moe.router_options.experts: '\*' needs expert 3, .* 0 to 2"),
        ({"experts": {"*": "a"}}, r"moe.router_options.experts: '\*' needs expert 'a', .* 0 to 2"),
        ({"experts": {}}, "moe.router_options.experts: {} is empty"),
    ],
)
def test_a_task_without_an_expert_is_an_error(settings, message, tiny):
    config = TaskMoEConfig(num_experts=3, router="fixed", gate="raw", router_options=settings)
    with pytest.raises(ConfigError, match=message):
        attach(tiny("llama"), config, ["sort", "sum", "translate"], dry_run=False)


def test_a_name_counts_before_patterns():
    tasks = TaskTable.from_names(["sum", "sum1", "sum[1]"])
    for experts, expected in (
        ({"*": 0, "sum[1]": 2, "sum": 1}, [1, 0, 2]),
        ({"sum[1]": 2, "sum": 1, "*": 0}, [1, 2, 2]),  # as a pattern it matches sum1
    ):
        config = TaskMoEConfig(num_experts=3, router="fixed", router_options={"experts": experts})
        router = ROUTERS["fixed"](config, ["model"], tasks, 0)
        assert router(torch.arange(3), None)[0, :, 0].argmax(-1).tolist() == expected


def test_random_routes_belong_to_the_task_whatever_the_table():
    router = build("random_tasks", experts=2)
    routes = router(torch.arange(TASKS), None)
    assert torch.equal(routes.sum(-1), torch.ones(GROUPS, TASKS, HEADS))
    assert set(routes.unique().tolist()) == {0.0, 0.5}
    assert torch.equal(build("random_tasks", experts=2, num_tasks=9)(torch.arange(TASKS), None), routes)
    assert not torch.equal(build("random_tasks", experts=2, seed=1)(torch.arange(TASKS), None), routes)
    many = build("random_tasks", num_tasks=400)(torch.arange(400), None)
    assert torch.allclose(many.mean(1), torch.full((GROUPS, HEADS, EXPERTS), 0.25), atol=0.1)
    assert len(many.flatten(2).unique(dim=1)[0]) > 10, "tasks differ"


def test_random_instances_have_a_route_a_sequence(tiny, batch, shaken, head, gradients, close, checkpoint):
    config = TaskMoEConfig(
        r=2, num_experts=4, router="random_instances", gate="raw", router_options={"experts": 2}
    )
    model = shaken(attach(tiny("llama"), config, 3)).eval()
    inputs, seen = batch("llama", [0, 0, 2]), []
    layers = [m for m in model.modules() if hasattr(m, "token_routing")]
    hooks = [
        layer.token_routing.register_forward_hook(lambda m, a, out: seen.append(out.values))
        for layer in layers
    ]
    head(model(**inputs))
    for gates_ME in seen:
        of_sequence = gates_ME.view(3, 9, 4)
        assert torch.equal(of_sequence, of_sequence[:, :1].expand(3, 9, 4)), "one route a sequence"
        assert set(gates_ME.unique().tolist()) == {0.0, 0.5}
        assert torch.equal(gates_ME.sum(-1), torch.ones(27))
    assert len(torch.stack(seen)[:, ::9].flatten(0, 1).unique(dim=0)) > 3, "they are drawn"
    for hook in hooks:
        hook.remove()
    expected = None
    for mode in ("none", "reentrant", "non-reentrant"):
        torch.manual_seed(0)
        found = gradients(model, head(checkpoint(model, mode)(**inputs, use_cache=False)).square().sum())
        close(found, expected or found)
        expected = expected or found
