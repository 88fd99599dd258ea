"""The wrapped model: identity, task isolation, packs, task ids, gates, parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch

from taskmoe.moe import TaskError, TaskMoEConfig, TaskTable, attach

CONFIG = TaskMoEConfig(r=2, num_experts=3, router_init_std=0.5)
NAMES = ["sort", "sum", "translate"]


@pytest.mark.parametrize("compose", ["after", "before"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "top_k", "one_hot", "uniform"])
def test_step_0_equals_the_base_bit_for_bit(kind, compose, gate, tiny, batch, head):
    top_k, router = (2 if gate == "top_k" else None), ("none" if gate == "uniform" else "task_table")
    config = TaskMoEConfig(r=2, num_experts=3, compose=compose, gate=gate, top_k=top_k, router=router)
    inputs = batch(kind, [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(
        tiny(kind).eval().requires_grad_(False)(**inputs)
    )  # another attention kernel serves T5 else
    found = head(attach(tiny(kind), config, NAMES, dry_run=False).eval()(**inputs, task_ids=tasks))
    assert torch.equal(found, expected)


def test_disable_adapter_is_the_base_bit_for_bit(kind, tiny, batch, head, routed):
    model, inputs = routed(kind), batch(kind, [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(
        tiny(kind).eval().requires_grad_(False)(**inputs)
    )  # another attention kernel serves T5 else
    assert not torch.equal(head(model(**inputs, task_ids=tasks)), expected)
    with model.disable_adapter():
        assert torch.equal(head(model(**inputs, task_ids=tasks)), expected)
        assert torch.equal(head(model(**inputs)), expected), "the base needs no tasks"
    with pytest.raises(TaskError, match="task_ids are missing"):
        model(**inputs)


def test_disable_adapter_ends_with_an_error_too(batch, routed):
    model = routed("llama")
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    with pytest.raises(TaskError):
        model(input_ids=batch("llama", [0])["input_ids"])


def test_a_mixed_batch_equals_one_task_at_a_time(kind, batch, head, routed, gradients, close, reading):
    model, inputs = routed(kind), batch(kind, [2, 0, 1, 0])
    out, loss = reading(model, inputs)
    whole = gradients(model, loss)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    parts = []
    for task in range(3):
        rows = inputs["task_ids"] == task
        parts.append((rows, head(model(**{n: v[rows] for n, v in inputs.items()}))))
        (parts[-1][1] * weights[rows]).sum().backward()
    for rows, part in parts:
        close(part, out[rows])
    close(gradients(model), whole)


def test_the_task_decides(kind, batch, head, routed):
    model, inputs = routed(kind), batch(kind, [0, 1, 2])
    first = head(model(**inputs))
    second = head(model(**{**inputs, "task_ids": [0, 2, 2]}))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])
    assert not torch.allclose(first[1], second[1], rtol=1e-3)


def test_packed_rows_equal_separate_ones(tiny, routed, gradients, close):
    """Position ids restart at each row and no mask is passed, as the packing collator lays them out.

    In float64: the two batches have other shapes, and other shapes other ways of summing."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("llama", "gpt2"):
        model = routed(kind).double()
        rows = [torch.randint(4, 61, (1, n), generator=generator) for n in (5, 3, 4, 2, 6, 4)]
        tasks = [2, 0, 1, 1, 0, 2]
        packs = [(0, 1, 2), (3, 4, 5)]
        positions = [torch.cat([torch.arange(rows[i].shape[1]) for i in p]) for p in packs]
        out = model(
            input_ids=torch.stack([torch.cat([rows[i][0] for i in p]) for p in packs]),
            position_ids=torch.stack(positions),
            task_ids=torch.tensor([[tasks[i] for i in p for _ in range(rows[i].shape[1])] for p in packs]),
            use_cache=False,
        ).logits
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        packed = gradients(model, (out * weights).sum())
        largest = out.detach().abs().max()
        for p, logits, weight in zip(packs, out, weights, strict=True):
            start = 0
            for i in p:
                alone = model(input_ids=rows[i], task_ids=[tasks[i]]).logits[0]
                end = start + len(alone)
                assert (alone - logits[start:end]).abs().max() <= 1e-12 * largest
                (alone * weight[start:end]).sum().backward()
                start = end
        close(gradients(model), packed, bound=1e-12)


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (None, "task_ids are missing"),
        ([], "task_ids are empty"),
        ([0, 1, 3], r"task id 3 is not in the table of 3 tasks \(0\.\.2\)"),
        (torch.tensor([0, -1, 2]), "task id -1 is not in the table"),
        (["sort", "sums", "translate"], "unknown task 'sums'.*nearest.*sum"),
        ("sort", "task_ids are 'sort'"),
        (1, "task_ids are 1"),
        (torch.tensor(1), "task_ids are 1"),
        ([0.5, 1.0, 2.0], "task_ids hold 0.5"),
        (torch.tensor([True, False, True]), "task_ids hold True"),
        ([0], "task_ids name 1 sequences, input_ids holds 3"),
        ([0, 1, 2, 0, 1, 2], "task_ids name 6 sequences, input_ids holds 3"),
        (torch.zeros(3, 4, dtype=torch.int64), "packed task_ids have 4 positions a row, input_ids has 9"),
        ([[0] * 9, [1] * 9, [2] * 8], "unequal length"),
    ],
)
def test_wrong_task_ids_are_one_clear_error(task_ids, message, batch, routed):
    inputs = {**batch("llama", [0, 0, 0]), "task_ids": task_ids}
    model = routed("llama")
    with pytest.raises(TaskError, match=message):
        model(**inputs)
    with pytest.raises(TaskError, match=message):
        model.generate(**inputs, max_new_tokens=1)


def test_task_ids_in_every_form(batch, head, routed):
    model, inputs = routed("llama"), batch("llama", [2, 0, 1])
    expected = head(model(**inputs))
    tasks = inputs["task_ids"]
    for form in (tasks.tolist(), tasks.int(), tasks.numpy(), ["translate", "sort", "sum"], tuple(tasks)):
        assert torch.equal(head(model(**{**inputs, "task_ids": form})), expected)
    packed = head(model(**{**inputs, "task_ids": tasks.unsqueeze(1).expand(3, 9)}))
    assert torch.equal(packed, expected)


def test_without_a_forward_of_the_wrapped_model_no_tasks_are_known(batch, routed):
    with pytest.raises(TaskError, match="no tasks are known here"):
        routed("llama").base_model(input_ids=batch("llama", [0])["input_ids"])


def test_gates_of_every_task_and_group(routed):
    model = routed("llama", gate="top_k", top_k=2)
    gates = model.gates()
    assert list(gates) == model.routing.groups
    assert len(gates) == 14  # two layers of q, k, v, o, gate, up, down
    for values in gates.values():
        assert values.shape == (3, 1, 3)
        assert ((values > 0).sum(-1) == 2).all()
        assert torch.allclose(values.sum(-1), torch.ones(3, 1))
    assert not any(v.requires_grad for v in gates.values())


@pytest.mark.parametrize("compose", ["after", "before"])
def test_uniform_gates_give_every_expert_one_eth(compose, tiny, batch, head, routed):
    model, inputs = routed("llama", compose=compose, gate="top_k", top_k=2), batch("llama", [2, 0, 1])
    with model.uniform_gates():
        found = head(model(**inputs))
    uniform = routed("llama", compose=compose, gate="uniform", router="none")
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in uniform.named_parameters():
            p.copy_(own[name])
    assert torch.equal(found, head(uniform(**inputs)))
    assert not torch.equal(found, head(model(**inputs)))


def test_routers_leave_no_graph_under_no_grad(batch, head, routed):
    model = routed("llama", router="task_mlp", task_embedding_dim=4, router_hidden_dim=4)
    with torch.no_grad():
        context = model.context([0, 1])
        out = head(model(**batch("llama", [0, 1])))
    assert context.bridge is None
    assert not any(g.values.requires_grad for g in context.gates)
    assert not out.requires_grad


def test_parameter_groups_hold_every_parameter_once(routed):
    model = routed("llama", router="task_mlp", task_embedding_dim=4, router_hidden_dim=4,
                   modules_to_save=["lm_head"])  # fmt: skip
    groups = model.parameter_groups()
    names = [n for ps in groups.values() for n, _ in ps]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert [n for n, _ in groups["task_embedding"]] == ["routing.representation.embedding_TD"]
    assert [n for n, _ in groups["router"]] == [
        f"routing.router.{n}" for n in ("w1_SDF", "b1_SF", "w2_SFE", "b2_SE")
    ]
    assert [n for n, _ in groups["saved"]] == ["base_model.lm_head.saved.weight"]
    assert len(groups["experts"]) == 28
    assert not groups["heads"]


def test_set_trainable_trains_just_these_groups(routed):
    model = routed("llama")
    assert model.set_trainable(("router",)) == ["routing.router.logits_STHE"]
    groups = model.trainable_groups()
    assert {g for g, ps in groups.items() if ps} == {"router"}
    with pytest.raises(ValueError, match=r"unknown group.*routers.*known are base, experts, router"):
        model.set_trainable(("routers",))


def test_a_trained_base_leaves_the_originals_of_saved_modules_alone(batch, routed, gradients, reading):
    model = routed("llama", modules_to_save=["lm_head"])
    names = model.set_trainable(("base", "experts", "router", "saved"))
    assert "base_model.lm_head.original.weight" not in names
    assert "base_model.model.embed_tokens.weight" in names
    found = gradients(model, reading(model, batch("llama", [2, 0, 1]))[1])
    assert all(g.any() for g in found.values())


def test_print_trainable_parameters_has_pefts_form(routed, capsys):
    model = routed("llama")
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = f"{100 * trainable / total:.4f}"
    expected = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share}\n"
    assert capsys.readouterr().out == expected


def test_a_deep_copy_is_a_model_of_its_own(batch, head, routed, gradients, close, reading):
    model, inputs = routed("t5", modules_to_save=["lm_head"]), batch("t5", [2, 0, 1])
    expected = head(model(**inputs)).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    out, loss = reading(twin, inputs)
    assert torch.equal(out, expected)
    assert all(g.any() for g in gradients(twin, loss).values())
    assert all(p.grad is None for p in model.parameters())


def test_a_table_of_tasks_is_kept(tiny, routed):
    table = TaskTable.from_names(NAMES)
    assert attach(tiny("llama"), CONFIG, table, dry_run=False).tasks is table
    assert attach(tiny("llama"), CONFIG, 2, dry_run=False).tasks.names == ["task-0", "task-1"]
    assert routed("llama").config.vocab_size == 61, "the base model's own attributes are at hand"
