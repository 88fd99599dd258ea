"""One backward pass gives what a backward pass for each task's rows gives, and PCGrad on whole vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from taskmoe.moe import ConfigError, TaskError, TaskMoEConfig, TaskTable, attach, siblings
from taskmoe.moe.heads import attach_heads
from taskmoe.train.choices import generator
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.surgery.direct import DirectSurgery
from taskmoe.train.task_gradients import TaskGradients
from taskmoe.train.task_scope import find_scope

VOCAB, NAMES = 29, ["sort", "sum", "translate", "copy"]
KINDS, MODES = ["llama", "t5", "bert"], ["none", "reentrant", "non-reentrant"]
TASKS = [2, 0, 1, 0, 2, 2]  # "copy" is in no batch
MLP = {"router": "task_mlp", "task_embedding_dim": 4, "router_hidden_dim": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "after, table": {},
    "after, mlp": MLP,
    "after, mlp, top-k": {**MLP, "gate": "top_k", "top_k": 2},
    "before, mlp": {**MLP, "compose": "before"},
    "before, mlp, heads": {**MLP, "compose": "before", "num_heads": 2},
    "before, top-k": {**MLP, "compose": "before", "gate": "top_k", "top_k": 2},
    "adapter, mlp": {**MLP, "bank": "adapter"},
    "adapter, top-k": {**MLP, "bank": "adapter", "gate": "top_k", "top_k": 2},
    "generated": {"bank": "generated", "task_embedding_dim": 4, "bank_options": {"hidden": 5, "dim": 4}},
    "fusion": {"bank": "fusion", "router": "none", "gate": "uniform"},
    "layers, mlp": {**MLP, "bank": "module"},
    "attention, top-k": {
        **MLP, "bank": "module", "bank_options": {"of": "attention"}, "gate": "top_k", "top_k": 2
    },
    "ffns, one-hot": {**MLP, "bank": "module", "bank_options": {"of": "ffn"}, "gate": "one_hot"},
    "ffns by token": {
        "bank": "module", "bank_options": {"of": "ffn"}, "router": "token_linear", "gate": "top_k", "top_k": 2
    },
    "shared prompt": {"bank": "multitask_prompt", "bank_options": {"length": 3}},
    "prompts, mlp": {**MLP, "bank": "prompt_bank", "bank_options": {"length": 3}},
    "prompts, top-k": {
        **MLP, "bank": "prompt_bank", "gate": "top_k", "top_k": 2, "bank_options": {"length": 3},
    },
}


@pytest.fixture(autouse=True)
def siblings_share_small_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU leaves small batches alone; here they are all small."""
    monkeypatch.setattr(siblings, "SMALL", 0)


def base(kind: str) -> nn.Module:
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))  # fmt: skip
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=0, decoder_start_token_id=0))  # fmt: skip
    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3))  # fmt: skip


def build(kind: str = "llama", mode: str = "none", dtype: Any = torch.float64, **settings: Any) -> Any:
    """A tiny model with experts of ordinary size; a BERT has a head for each task."""
    torch.manual_seed(0)
    tasks, made = TaskTable(), base(kind)
    for name in NAMES:
        tasks.add(name, ["a", "b", "c"] if kind == "bert" else None)
    if kind == "bert":
        made = attach_heads(made, tasks)
    model = attach(made, TaskMoEConfig.from_dict({"r": 2, "num_experts": 3, **settings}), tasks)
    with torch.no_grad():
        for group, parameters in model.parameter_groups().items():
            for _, p in parameters if group not in ("base", "heads") else ():
                p.copy_(torch.randn(p.shape) * 0.3)
    model.to(dtype).train()
    if mode != "none":
        # transformers renames it
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model.base_model, new if hasattr(model.base_model, new) else old)(
            {"use_reentrant": mode == "reentrant"}
        )
    return model


def batch(kind: str = "llama", tasks: list[int] = TASKS, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 7), generator=draw).repeat(len(tasks), 1)[: len(tasks)]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": tasks}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (len(tasks), 5), generator=draw)
    return inputs


def losses(model: Any, inputs: dict[str, Any]) -> Tensor:
    """A loss a row, [B]; odd tasks want the opposite of even ones, almost, so that gradients conflict."""
    logits = model(**inputs).logits.flatten(1)

    def noise(seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(logits.shape[1], generator=draw, dtype=torch.float64).to(logits.dtype)

    wanted = [(-1) ** t * noise(9) + 0.7 * noise(t) for t in inputs["task_ids"]]
    return (logits * torch.stack(wanted)).sum(1)


def sliced(inputs: dict[str, Any], task: int) -> dict[str, Any]:
    mask = torch.tensor([t == task for t in inputs["task_ids"]])
    tensors = {n: v[mask] for n, v in inputs.items() if n != "task_ids"}
    return {**tensors, "task_ids": [task] * int(mask.sum())}


def by_definition(model: Any, batches: list[dict[str, Any]], step: int = 0) -> dict[str, Tensor]:
    """{name: gradient}: a backward pass for each task's rows, PCGrad on whole vectors.

    What tasks do not share keeps its sum. The model is left without gradients.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shared = list(find_scope(model).shared)
    vectors, rest = [], {n: torch.zeros_like(p) for n, p in trained.items() if n not in shared}
    for task in sorted({t for inputs in batches for t in inputs["task_ids"]}):
        for inputs in batches:
            if task in inputs["task_ids"]:
                losses(model, sliced(inputs, task)).sum().backward()
        vectors.append(torch.cat([flat(trained[n]) for n in shared]))
        for n in rest:
            rest[n] += 0 if trained[n].grad is None else trained[n].grad
        model.zero_grad()
    assert any(a @ b < 0 for a, b in itertools.combinations(vectors, 2))  # else there is nothing to project
    draw, total = generator(0, step), torch.zeros_like(vectors[0])
    for i, own in enumerate(vectors):
        g = own.clone()
        for j in torch.randperm(len(vectors), generator=draw).tolist():
            if j != i and g @ vectors[j] < 0:
                g -= (g @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
        total += g
    parts = total.split([trained[n].numel() for n in shared])
    return {**rest, **{n: g.view_as(trained[n]) for n, g in zip(shared, parts, strict=True)}}


def flat(p: nn.Parameter) -> Tensor:
    return torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.flatten()


def found(model: Any) -> dict[str, Tensor]:
    return {n: flat(p).view_as(p) for n, p in model.named_parameters() if p.requires_grad}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative, of all entries as one vector."""
    assert a.keys() == b.keys()
    off, size = (torch.cat([v.flatten().double() for v in d]) for d in ([a[n] - b[n] for n in b], b.values()))
    return float(off.norm() / size.norm())


def bound(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-12


def diagonal(*axes: Sequence[str]) -> list[Any]:
    """Every combination; those off a diagonal that meets every value of every axis are slow."""
    chosen = []
    for at in itertools.product(*(range(len(axis)) for axis in axes)):
        marks = () if sum(at) % len(axes[-1]) == 0 else pytest.mark.slow
        chosen.append(pytest.param(*(axis[i] for axis, i in zip(axes, at, strict=True)), marks=marks))
    return chosen


@pytest.mark.parametrize(("kind", "variant", "mode"), diagonal(KINDS, list(VARIANTS), MODES))
def test_fused_equals_pcgrad_by_definition(kind, variant, mode):
    for dtype in (torch.float32, torch.float64):
        model = build(kind, mode, dtype, **VARIANTS[variant])
        expected = by_definition(model, [batch(kind)])
        grads = TaskGradients(model)
        assert grads.way == "fused"
        with grads:
            losses(model, batch(kind)).sum().backward()
        grads.combine("pcgrad")
        assert distance(found(model), expected) <= bound(dtype)


@pytest.mark.parametrize(("kind", "variant", "mode"), diagonal(KINDS, list(VARIANTS), MODES))
def test_separate_serves_every_parameter(kind, variant, mode):
    for dtype in (torch.float32, torch.float64):
        model = build(kind, mode, dtype, **VARIANTS[variant])
        model.set_trainable(("base", "experts", "router", "task_embedding", "heads"))
        expected = by_definition(model, [batch(kind)])
        grads = TaskGradients(model)
        assert grads.way == "separate"
        with grads:
            rows = losses(model, batch(kind))
            grads.backward({n: rows[torch.tensor(TASKS) == i].sum() for i, n in enumerate(NAMES[:3])})
        grads.combine("pcgrad")
        assert distance(found(model), expected) <= bound(dtype)


@pytest.mark.parametrize("way", ["fused", "separate"])
def test_backward_passes_add_up_before_they_are_combined(way):
    model = build(**MLP)
    batches = [batch(tasks=[1, 0, 0], seed=1), batch(tasks=[0, 3, 3], seed=2), batch(tasks=[1], seed=3)]
    expected = by_definition(model, batches, step=4)
    grads = TaskGradients(model, way=way)
    for inputs in batches:
        with grads:
            rows = losses(model, inputs)
            tasks = torch.tensor(inputs["task_ids"])
            if way == "fused":
                rows.sum().backward()
            else:
                grads.backward({t: rows[tasks == t].sum() for t in sorted(set(inputs["task_ids"]))})
    # Rows are in the order in which tasks came; the definition has them in the order of their ids.
    grads.rows = dict(sorted(grads.rows.items()))
    assert grads.row_tasks() == [[0], [1], [3]]
    grads.combine("pcgrad", step=4)
    assert distance(found(model), expected) <= 1e-12


def test_the_sum_is_plain_training():
    model = build(dtype=torch.float32, **MLP)
    losses(model, batch()).sum().backward()
    expected = found(model)
    model.zero_grad()
    with TaskGradients(model, TASKS) as grads:
        losses(model, batch()).sum().backward()
    report = grads.combine("sum")
    assert distance(found(model), expected) <= 1e-6
    assert report.rows == [[0], [1], [2]] and report.weights["all"].tolist() == [1, 1, 1]


def test_later_steps_start_anew():
    model = build(**MLP)
    grads = TaskGradients(model)
    for step in range(2):
        expected = by_definition(model, [batch(seed=step)], step)
        with grads:
            losses(model, batch(seed=step)).sum().backward()
        grads.combine()
        assert distance(found(model), expected) <= 1e-12
        model.zero_grad()


def test_what_one_task_alone_touches_keeps_its_gradient():
    for kind, name in (("llama", "routing.router.logits_STHE"), ("bert", "base_model.classifier.weight_TNK")):
        model = build(kind)
        losses(model, batch(kind)).sum().backward()
        expected = found(model)[name]
        model.zero_grad()
        with TaskGradients(model) as grads:
            losses(model, batch(kind)).sum().backward()
        assert name not in grads.matrix.shapes and grads.scope.private[name][1] in (0, 1)
        grads.combine("pcgrad")
        assert expected.any() and distance({name: found(model)[name]}, {name: expected}) <= 1e-12


@pytest.mark.parametrize(("scope", "inside"), [("experts", "bank"), ("routers", "routing")])
def test_out_of_scope_is_the_plain_sum(scope, inside):
    model = build(**MLP)
    losses(model, batch()).sum().backward()
    plain = found(model)
    model.zero_grad()
    with TaskGradients(model, scope=scope) as grads:
        losses(model, batch()).sum().backward()
    assert grads.scope.rest and all(inside in n for n in grads.scope.shared)
    grads.combine("pcgrad")
    changed = {n for n, g in found(model).items() if not torch.allclose(g, plain[n], rtol=1e-9, atol=0)}
    assert changed and changed <= set(grads.scope.shared)


def test_experts_train_beside_the_base_in_one_pass():
    model = build()
    model.set_trainable(("base", "experts", "router"))
    assert TaskGradients(model, scope="experts").way == "fused"
    with pytest.raises(ConfigError, match=r"surgery.way: 'fused'.*scope: experts"):
        TaskGradients(model, way="fused")


def test_layers_are_combined_one_by_one():
    model = build(**MLP)
    with TaskGradients(model, scope="layer") as grads:
        losses(model, batch()).sum().backward()
    layers = ["base_model.model.layers.0", "base_model.model.layers.1", "routing.router"]
    assert list(grads.scope.groups) == layers
    J = {g: torch.cat([grads.matrix.block(n) for n in grads.scope.groups[g]], 1) for g in layers[:2]}
    report = grads.combine("pcgrad")
    for g in layers[:2]:
        weights = Surgery("pcgrad").weights(J[g] @ J[g].T, 0, [0, 1, 2])
        assert torch.allclose(report.weights[g], weights, rtol=1e-9)
        mine = torch.cat([flat(grads.scope.shared[n]) for n in grads.scope.groups[g]])
        assert torch.allclose(mine, weights @ J[g], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(report.weights[layers[0]], report.weights[layers[1]])


@pytest.mark.parametrize("method", ["gradvac", "graddrop"])
def test_methods_that_see_the_matrix(method):
    model = build(**MLP)
    with TaskGradients(model) as grads:
        losses(model, batch()).sum().backward()
    grads._route()
    blocks = [grads.matrix.block(n) for n in grads.scope.shared]
    sizes: dict[str, int] = {}
    for n, block in zip(grads.scope.shared, blocks, strict=True):
        layer = "router" if "routing" in n else n.split(".layers.")[1].split(".")[0]
        sizes[layer] = sizes.get(layer, 0) + block.shape[1]
    expected = DirectSurgery(method).combine(torch.cat(blocks, 1), list(sizes.values()), 0, [0, 1, 2])
    grads._routers.clear()  # their rows are in already
    assert grads.combine(method).weights is None
    mine = torch.cat([flat(p) for p in grads.scope.shared.values()])
    assert torch.allclose(mine, expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["after, mlp, top-k", "before, mlp, heads"])
@pytest.mark.parametrize("scope", ["all", "experts", "layer"])
def test_weights_used_again_give_what_a_full_step_with_them_gives(variant, scope):
    model = build(**VARIANTS[variant])
    grads = TaskGradients(model, scope=scope)
    kept = {g: {0: 0.3, 1: 1.7 + i, 2: -0.4} for i, g in enumerate(grads.scope.groups)}
    with grads:
        losses(model, batch()).sum().backward()
    grads.matrix.reduce()
    grads._route()
    order = [t[0] for t in grads.row_tasks()]
    grads._weigh({g: torch.tensor([w[t] for t in order], dtype=torch.float64) for g, w in kept.items()})
    expected = found(model)
    model.zero_grad()
    grads.begin({0: 0, 1: 1, 2: 2}, kept)
    with grads:
        losses(model, batch()).sum().backward()
    grads.finish_weighted()
    assert distance(found(model), expected) <= 1e-12


def test_tasks_beyond_max_tasks_share_rows():
    model = build(**MLP)
    with TaskGradients(model, TASKS, max_tasks=2) as grads:
        losses(model, batch()).sum().backward()
    assert len(grads.row_tasks()) == 2 and sorted(t for row in grads.row_tasks() for t in row) == [0, 1, 2]
    grads.combine("sum")
    with pytest.raises(ConfigError, match=r"surgery.max_tasks.*give task_ids"):
        TaskGradients(model, max_tasks=2)


@pytest.mark.parametrize("variant", ["after, mlp", "before, mlp, heads"])
def test_halves_of_a_task_are_the_null_of_its_cosines(variant):
    model = build(**VARIANTS[variant])
    expected = by_definition(model, [batch()])
    grads = TaskGradients(model)
    grads.begin({0: 0, 1: 1, 2: 2}, halves=True)
    with grads:
        losses(model, batch()).sum().backward()
    report = grads.combine("pcgrad")
    assert distance(found(model), expected) <= 1e-12  # the tasks themselves are as ever
    banks = [p for n, p in grads.scope.shared.items() if "bank" in n]
    model.zero_grad()

    def alone(picked: list[int]) -> Tensor:
        losses(model, batch())[picked].sum().backward()
        got = torch.cat([flat(p) for p in banks])
        model.zero_grad()
        return got

    # Task 0 has the sequences 1 and 3; task 2 has 0 and 5 in one half, 4 in the other; task 1 has one.
    by_hand = [torch.cosine_similarity(alone(a), alone(b), dim=0) for a, b in (([1], [3]), ([0, 5], [4]))]
    assert torch.allclose(report.same_task[[0, 2]], torch.stack(by_hand), rtol=1e-9)
    assert report.same_task[1].isnan()


@pytest.mark.parametrize("variant", ["after, mlp", "before, mlp, heads"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_parts_come_in_one_order_whatever_the_batch(kind, variant, monkeypatch):
    """Ranks with batches of different size add them up as they come: in another order they would mix."""
    model = build(kind, **VARIANTS[variant])
    grads = TaskGradients(model)

    def order(tasks: list[int]) -> list[str]:
        came = []
        keep = grads.keep
        with monkeypatch.context() as patch, grads:
            patch.setattr(grads, "keep", lambda p, *a: (came.append(grads._names[id(p)]), keep(p, *a))[1])
            losses(model, batch(kind, tasks)).sum().backward()
        grads.combine("sum")
        model.zero_grad()
        return came

    shared, shrink = [], siblings.shrink
    monkeypatch.setattr(siblings, "shrink", lambda *a: (shared.append(1), shrink(*a))[1])
    few, many = [0, 0], [0, 2, 1, 0] * 3
    together = order(many)
    assert shared and set(together) == set(grads.scope.banks)
    shared.clear()
    monkeypatch.setattr(siblings, "SMALL", 1 << 30)
    assert order(many) == together and order(few) == together  # on another rank each linear works alone
    assert not shared


def test_a_forward_pass_outside_is_noticed():
    model = build()
    loss = losses(model, batch()).sum()
    with TaskGradients(model) as grads:
        loss.backward()
    with pytest.raises(RuntimeError, match="the forward pass must stand inside"):
        grads.combine()
    grads = TaskGradients(model)
    for _ in range(2):  # noticed, and noticed again
        with pytest.raises(RuntimeError, match="has a gradient already"), grads:
            pass
        assert model.parts is None


def test_a_forward_pass_outside_is_noticed_with_the_tasks_given():
    model = build()
    loss = losses(model, batch()).sum()
    with TaskGradients(model, TASKS) as grads:
        loss.backward()
    with pytest.raises(RuntimeError, match="the forward pass must stand inside"):
        grads.combine("sum")


def test_a_pass_of_its_own_for_each_task_is_refused_where_one_is_split():
    model = build(**MLP)
    grads = TaskGradients(model)
    with grads:
        rows = losses(model, batch())
        with pytest.raises(RuntimeError, match=r"way is fused.*give way='separate'"):
            grads.backward({"sort": rows[[1, 3]].sum()})
        with pytest.raises(RuntimeError, match=r"way is fused.*give way='separate'"):
            grads.harvest(0)


@pytest.mark.parametrize("given", [None, TASKS])
def test_after_an_error_a_step_starts_anew(given):
    model = build(**MLP)
    expected = by_definition(model, [batch()])
    grads = TaskGradients(model, given)
    with pytest.raises(KeyError), grads:
        losses(model, batch(seed=5)).sum().backward()
        raise KeyError
    model.zero_grad()
    with grads:
        losses(model, batch(seed=6)).sum().backward()
    with pytest.raises(ConfigError, match="'pcgard' is not one of"):
        grads.combine("pcgard")
    with pytest.raises(RuntimeError, match="has a gradient already"), grads:
        pass
    model.zero_grad()
    with grads:
        losses(model, batch()).sum().backward()
    grads.combine("pcgrad", step=0)
    assert distance(found(model), expected) <= 1e-12


def test_a_method_chosen_by_name_keeps_its_state():
    model, built = build(**MLP), DirectSurgery("gradvac", {"beta": 0.5})
    grads = TaskGradients(model)

    def both(step: int) -> list[dict[str, Tensor]]:
        made = []
        for how in ({"method": "gradvac", "beta": 0.5}, {"method": built}):
            model.zero_grad()
            with grads:
                losses(model, batch(seed=step)).sum().backward()
            grads.combine(step=step, **how)
            made.append(found(model))
        return made

    for step in range(3):
        assert distance(*both(step)) <= 1e-12


def test_a_method_that_goes_by_task_gets_no_shared_rows():
    model = build(**MLP)
    with TaskGradients(model, TASKS, max_tasks=2) as grads:
        losses(model, batch()).sum().backward()
    with pytest.raises(ConfigError, match=r"surgery.max_tasks: 2, but 'gradvac' needs .*; set it to 3"):
        grads.combine("gradvac")


def test_a_bank_that_keeps_no_parts_is_noticed():
    model = build()
    bank = model.get_submodule("base_model.model.layers.0.mlp.down_proj.bank")
    bank.factors = lambda gate: (bank.A_ErK.unsqueeze(0), bank.B_ErN.unsqueeze(0))
    with TaskGradients(model) as grads:
        losses(model, batch()).sum().backward()
    with pytest.raises(RuntimeError, match=r"down_proj.bank.A_ErK has a gradient, but no task's part"):
        grads.combine("pcgrad")


def test_a_task_that_was_not_named_is_an_error():
    model = build()
    said = pytest.raises(TaskError, match="'translate' is in the batch but not among")
    with said, TaskGradients(model, ["sort", "sum"]):
        losses(model, batch()).sum().backward()


def test_nothing_shared_is_an_error():
    model = build()  # the rows of a table belong to one task each
    with pytest.raises(ConfigError, match=r"surgery.scope: 'routers' holds no trainable parameter"):
        TaskGradients(model, scope="routers")
    with pytest.raises(ConfigError, match=r"surgery.scope: 'heads' is none of"):
        TaskGradients(model, scope="heads")
    with pytest.raises(ConfigError, match=r"surgery.way: 'fast' is none of"):
        TaskGradients(model, way="fast")


def test_an_evaluation_between_changes_nothing():
    model = build(mode="reentrant", **MLP)
    expected = by_definition(model, [batch()])
    with TaskGradients(model) as grads:
        loss = losses(model, batch()).sum()
        with torch.no_grad():
            model(**batch(tasks=[3, 3]))
        loss.backward()
    grads.combine()
    assert distance(found(model), expected) <= 1e-12
