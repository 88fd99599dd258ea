"""A library grows: old tasks give what they gave, new experts and tasks train, and all of it is saved."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, TaskTable, attach
from taskmoe.moe.growth import grow, merge_experts, start_task
from taskmoe.moe.tasks import TaskError

OLD, NEW = ["a", "b"], TaskTable.from_names(["a", "b", "c"])
ELM = {"router": "fixed", "gate": "raw", "router_options": {"experts": {"a": 0, "b": 1}}, "num_experts": 2}
WITH_C = {"experts": {"a": 0, "b": 1, "c": 2}}


@pytest.fixture
def library(tiny, shaken, tmp_path):
    """Settings -> a saved adapter of two tasks, and its model."""

    def make(**settings):
        config = TaskMoEConfig.from_dict({"r": 2, "num_experts": 2, "router_init_std": 0.5, **settings})
        model = shaken(attach(tiny("llama"), config, OLD)).eval()
        model.save_pretrained(tmp_path / "library")
        return tmp_path / "library", model

    return make


def logits(model, tasks):
    ids = torch.randint(4, 61, (len(tasks), 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, task_ids=tasks).logits


def experts(model):
    return [m.bank for m in model.modules() if hasattr(m, "bank")]


@pytest.mark.parametrize(
    "settings",
    [ELM, {"router": "task_table"}, {"router": "task_table", "gate": "sigmoid", "compose": "before"},
     {"router": "task_table", "gate": "one_hot"},
     {"router": "task_table", "gate": "top_k", "top_k": 2, "num_experts": 3}],
    ids=["elm", "softmax", "poly", "one_hot", "top_k"],
)  # fmt: skip
def test_old_tasks_give_what_they_gave(settings, library, tiny, close):
    folder, before = library(**settings)
    options = {"router_options": WITH_C} if settings is ELM else {}
    grown = grow(tiny("llama"), folder, before.moe_config.num_experts + 2, NEW, **options)
    close(logits(grown, OLD), logits(before, OLD))
    E = before.moe_config.num_experts
    assert all(not g[:2, :, E:].any() for g in grown.gates().values())
    assert all(not b.B_ErN[E:].any() for b in experts(grown))


def test_a_new_expert_trains_without_the_others(library, tiny, tmp_path, close):
    """One expert a task: the task that is new moves its own alone."""
    folder, before = library(**ELM)
    grown = grow(tiny("llama"), folder, 3, NEW, router_options=WITH_C)
    base = logits(grown, ["c"])
    with grown.disable_adapter():
        assert torch.equal(logits(grown, ["c"]), base)  # nothing yet
    optimizer = torch.optim.SGD([p for p in grown.parameters() if p.requires_grad], lr=1.0)
    ids = torch.randint(4, 61, (2, 6))
    grown.train()(input_ids=ids, labels=ids, task_ids=["c", "c"]).loss.backward()
    optimizer.step()
    for mine, other in zip(experts(grown), experts(before), strict=True):
        assert torch.equal(mine.A_ErK[:2], other.A_ErK) and torch.equal(mine.B_ErN[:2], other.B_ErN)
    assert any(b.B_ErN[2].any() for b in experts(grown))
    assert not torch.equal(logits(grown, ["c"]), base)
    close(logits(grown, OLD), logits(before, OLD))
    grown.save_pretrained(tmp_path / "grown")
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "grown")
    assert again.tasks.names == ["a", "b", "c"] and again.moe_config.num_experts == 3
    assert torch.equal(logits(again, ["c", "a"]), logits(grown, ["c", "a"]))


def open_mean(values):
    kept = [float(v) for v in values if v > -5e3]
    return sum(kept) / len(kept) if kept else 0.0


@pytest.mark.parametrize("rule", ["mean", "nearest"])
def test_a_library_that_grew_grows_again(rule, library, tiny, tmp_path):
    """Routes that were closed when an expert came say nothing about it; one that nobody uses starts at 0."""
    folder, _ = library(router="task_table", new_task_rows=rule)
    once = grow(tiny("llama"), folder, 4, NEW)
    start_task(once, "c", [0, 2], closed=-1e4)  # nobody is at expert 3
    once.save_pretrained(tmp_path / "once")
    more = TaskTable.from_names(["a", "b", "c", "d"])
    twice = grow(tiny("llama"), tmp_path / "once", 5, more)
    same = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "once", more)
    old, new, loaded = (m.routing.router.logits_STHE.detach() for m in (once, twice, same))
    for s in range(len(old)):
        row = [open_mean(old[s, :, 0, e]) for e in range(4)]
        assert row[3] == 0.0
        assert new[s, 3, 0].tolist() == pytest.approx([*row, sum(row) / 3], abs=1e-6)
        assert loaded[s, 3, 0].tolist() == pytest.approx(row, abs=1e-6)
    assert all(g[3].min() > 0.01 for g in twice.gates().values())


@pytest.mark.parametrize("rule", ["mean", "zero"])
def test_rows_of_new_tasks_follow_the_rule(rule, library, tiny):
    folder, before = library(router="task_table", new_task_rows=rule)
    grown = grow(tiny("llama"), folder, 3, NEW)
    old = before.routing.router.logits_STHE.detach()
    row = grown.routing.router.logits_STHE[:, 2].detach()
    mean = old.mean(1) if rule == "mean" else torch.zeros_like(old[:, 0])
    assert torch.equal(row[..., :2], mean)
    assert torch.allclose(row[..., 2], mean.mean(-1))


def test_tasks_alone_may_grow_under_any_router(library, tiny, close):
    folder, before = library(router="task_mlp", task_embedding_dim=4, router_hidden_dim=4)
    grown = grow(tiny("llama"), folder, 2, NEW)
    close(logits(grown, OLD), logits(before, OLD))
    table = before.routing.representation.embedding_TD
    assert torch.allclose(grown.routing.representation.embedding_TD[2], table.mean(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "task_mlp"}, "moe.router: 'task_mlp' with gate 'softmax' would change"),
        ({"router": "none", "gate": "uniform"}, "moe.router: 'none' with gate 'uniform' would change"),
        ({"router": "token_linear"}, "moe.router: 'token_linear' would send tokens"),
        ({"router": "task_table", "gate": "sigmoid", "gate_options": {"normalise": "sqrt"}}, "would change"),
    ],
)
def test_what_would_change_old_tasks_is_refused(settings, message, library, tiny):
    folder, _ = library(**settings)
    with pytest.raises(ConfigError, match=message):
        grow(tiny("llama"), folder, 3, NEW)


def test_a_map_that_moves_an_old_task_is_refused(library, tiny):
    folder, _ = library(**ELM)
    with pytest.raises(ConfigError, match="would change the old tasks' routes"):
        grow(tiny("llama"), folder, 3, NEW, router_options={"experts": {"a": 2, "b": 1, "c": 0}})


def test_a_library_does_not_shrink(library, tiny):
    folder, _ = library()
    with pytest.raises(ConfigError, match="1 is less than the 2 saved"):
        grow(tiny("llama"), folder, 1)
    with pytest.raises(TaskError, match="tasks only grow"):
        grow(tiny("llama"), folder, 3, TaskTable.from_names(["a"]))


def test_a_merge_is_the_mean_of_the_experts(library, tiny, close):
    """The mean of A and of B, as ELM merges adapters: written out on the weights of one layer."""
    folder, before = library(**ELM)
    grown = grow(tiny("llama"), folder, 3, NEW, router_options=WITH_C)
    merge_experts(grown, [0, 1], into=2)
    plain = tiny("llama").eval()
    with torch.no_grad():
        for name, layer in before.base_model.named_modules():
            if hasattr(layer, "bank"):
                A, B = layer.bank.A_ErK, layer.bank.B_ErN
                plain.get_submodule(name).weight += ((B[0] + B[1]) / 2).T @ ((A[0] + A[1]) / 2)
        ids = torch.randint(4, 61, (1, 6), generator=torch.Generator().manual_seed(0))
        close(logits(grown, ["c"]), plain(input_ids=ids).logits)
    close(logits(grown, OLD), logits(before, OLD))
    with pytest.raises(ConfigError, match="there is no expert 3"):
        merge_experts(grown, [0, 3], into=2)
    with pytest.raises(ConfigError, match="name the experts"):
        merge_experts(grown, [], into=2)


def test_a_task_starts_with_equal_shares_of_the_experts_found_for_it(library, tiny):
    folder, _ = library(router="task_table", num_experts=3)
    model = grow(tiny("llama"), folder, 3, NEW)
    start_task(model, "c", [0, 2])
    for gates in model.gates().values():
        assert torch.equal(gates[2, 0], torch.tensor([0.5, 0.0, 0.5]))
    with pytest.raises(ConfigError, match="start_task: experts"):
        start_task(model, "c", [3])
    with pytest.raises(TaskError):
        start_task(model, "d", [0])
