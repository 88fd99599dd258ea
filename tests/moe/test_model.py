"""The wrapped model on four architectures: identity, task isolation, checkpointing, packs, threads, parameter groups."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from taskmoe.moe import TaskError, TaskMoEConfig, TaskTable, attach

KINDS = ("llama", "gpt2", "t5", "bert")
NAMES = ["sort", "sum", "translate"]
CONFIG = TaskMoEConfig(r=2, num_experts=3, router_init_std=0.5)
MODES = ("none", "reentrant", "non-reentrant")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def routed(tiny, shaken):
    """kind, changes to the settings -> a tiny model with experts of ordinary size."""

    def make(kind, **changes):
        config = TaskMoEConfig.from_dict({**CONFIG.to_dict(), **changes})
        return shaken(attach(tiny(kind), config, NAMES, dry_run=False)).eval()

    return make


def reading(head, inputs, model):
    """A loss that reads every output with a weight of its own."""
    out = head(model(**inputs))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return out, (out * weights.to(out.dtype)).sum()


# -- the base model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compose", ["after", "before"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "top_k", "one_hot", "uniform"])
def test_step_0_equals_the_base_bit_for_bit(kind, compose, gate, tiny, batch, head):
    config = TaskMoEConfig(r=2, num_experts=3, compose=compose, gate=gate, top_k=2 if gate == "top_k" else None,
                           router="none" if gate == "uniform" else "task_table")  # fmt: skip
    inputs = batch(kind, [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(tiny(kind).eval().requires_grad_(False)(**inputs))  # another attention kernel serves T5 else
    found = head(attach(tiny(kind), config, NAMES, dry_run=False).eval()(**inputs, task_ids=tasks))
    assert torch.equal(found, expected)


def test_disable_adapter_is_the_base_bit_for_bit(kind, tiny, batch, head, routed):
    model, inputs = routed(kind), batch(kind, [1, 0, 2])
    tasks = inputs.pop("task_ids")
    expected = head(tiny(kind).eval().requires_grad_(False)(**inputs))  # another attention kernel serves T5 else
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


# -- tasks do not mix -----------------------------------------------------------------------------------------


def test_a_mixed_batch_equals_one_task_at_a_time(kind, batch, head, routed, gradients, close):
    model, inputs = routed(kind), batch(kind, [2, 0, 1, 0])
    out, loss = reading(head, inputs, model)
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
    """Position ids restart at each row and no mask is passed, as the packing collator lays them out."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("llama", "gpt2"):
        model = routed(kind)
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
        weights = torch.randn(out.shape, generator=generator)
        packed = gradients(model, (out * weights).sum())
        largest = out.detach().abs().max()
        for p, logits, weight in zip(packs, out, weights, strict=True):
            start = 0
            for i in p:
                alone = model(input_ids=rows[i], task_ids=[tasks[i]]).logits[0]
                end = start + len(alone)
                assert (alone - logits[start:end]).abs().max() <= 1e-6 * largest
                (alone * weight[start:end]).sum().backward()
                start = end
        close(gradients(model), packed)


# -- activation checkpointing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compose", ["after", "before"])
def test_checkpointing_none_reentrant_and_not_are_equal(
    kind, compose, batch, head, routed, gradients, close, checkpoint
):
    inputs, found = batch(kind, [2, 0, 1, 0]), {}
    for mode in MODES:
        model = checkpoint(routed(kind, compose=compose), mode)
        out, loss = reading(head, inputs, model)
        found[mode] = out, gradients(model, loss)
    for mode in MODES[1:]:
        close(found[mode][0], found["none"][0])
        close(found[mode][1], found["none"][1])


@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_then_one_backward(kind, mode, batch, head, routed, gradients, close, checkpoint):
    """A recompute belongs to its own forward, whatever ran since: other tasks, other sizes, an evaluation."""
    model = checkpoint(routed(kind), mode)
    one, two, other = batch(kind, [2, 0, 1]), batch(kind, [1, 2], length=7, seed=1), batch(kind, [0] * 4, seed=2)
    reading(head, one, model)[1].backward()
    reading(head, two, model)[1].backward()
    expected = gradients(model)
    first = reading(head, one, model)[1]
    with torch.no_grad():
        model(**other)
        with model.disable_adapter():
            model(**other)
    second = reading(head, two, model)[1]
    with model.uniform_gates(), torch.no_grad():
        model(**other)
    close(gradients(model, first + second), expected)


@pytest.mark.parametrize("mode", MODES)
def test_backward_on_another_thread(mode, batch, head, routed, gradients, close, checkpoint):
    model, inputs = checkpoint(routed("llama"), mode), batch("llama", [2, 0, 1])
    expected = gradients(model, reading(head, inputs, model)[1])
    loss, errors = reading(head, inputs, model)[1], []

    def backward():
        try:
            loss.backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors
    close(gradients(model), expected)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_routers_leave_the_experts_their_gradient(mode, batch, head, routed, gradients, close, checkpoint):
    model, inputs = routed("llama"), batch("llama", [2, 0, 1])
    expected = gradients(model, reading(head, inputs, model)[1])
    names = checkpoint(model, mode).set_trainable(("experts",))
    assert names == [n for n in expected if ".bank." in n]
    found = gradients(model, reading(head, inputs, model)[1])
    close(found, {n: expected[n] for n in names})


# -- where the routers' gradient comes from -------------------------------------------------------------------


def test_a_second_backward_on_a_retained_graph_doubles(kind, batch, head, routed, close):
    model = routed(kind)
    loss = reading(head, batch(kind, [2, 0, 1]), model)[1]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in trained.items()}
    loss.backward()
    close({n: p.grad for n, p in trained.items()}, {n: 2 * g for n, g in once.items()})


@pytest.mark.parametrize("mode", MODES)
def test_inputs_embeds_train_the_routers_too(kind, mode, batch, head, routed, gradients, close, checkpoint):
    model, inputs = checkpoint(routed(kind), mode), batch(kind, [2, 0, 1])
    expected = gradients(model, reading(head, inputs, model)[1])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = embeds
    if kind == "t5":
        inputs["decoder_inputs_embeds"] = model.get_input_embeddings()(inputs.pop("decoder_input_ids")).detach()
    close(gradients(model, reading(head, inputs, model)[1]), expected)


def test_positional_arguments_are_the_models_own(batch, head, routed, gradients, close):
    model, inputs = routed("bert"), batch("bert", [2, 0, 1])
    expected = gradients(model, reading(head, inputs, model)[1])
    out = head(model(inputs["input_ids"], inputs["attention_mask"], task_ids=[2, 0, 1]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    close(gradients(model, (out * weights.float()).sum()), expected)
    with pytest.raises(TypeError, match="do not fit"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"], task_ids=[2, 0, 1])


@pytest.mark.parametrize("mode", MODES)
def test_floating_inputs_beside_an_embedding_train_the_routers(mode, shaken, gradients, close, checkpoint):
    """Whisper's encoder reads features, its decoder token embeddings: both paths end in a bridge."""
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=61, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=1, pad_token_id=0,
                      encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                      max_source_positions=6, max_target_positions=8, bos_token_id=1, eos_token_id=2, dropout=0.0,
                      decoder_start_token_id=1)
    )  # fmt: skip
    features, ids = torch.randn(3, 4, 12), torch.randint(4, 61, (3, 5))
    inputs = {"input_features": features, "decoder_input_ids": ids}
    model = shaken(attach(base, CONFIG, NAMES, example_inputs=inputs)).double()
    inputs["input_features"] = features.double()
    found = gradients(
        checkpoint(model, mode), model(**inputs, task_ids=[2, 0, 1], use_cache=False).logits.square().sum()
    )["routing.router.logits_STHE"]
    router, step = model.routing.router.logits_STHE, 1e-6
    for group, name in enumerate(model.routing.groups):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                router[group, 2, 0, 1] += sign * step
                losses.append(model(**inputs, task_ids=[2, 0, 1]).logits.square().sum())
                router[group, 2, 0, 1] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)
        assert abs(slope - found[group, 2, 0, 1]) <= 1e-6 * found.abs().max(), name


def test_gradients_asked_for_by_other_means_are_refused_not_zero(batch, head, routed, adapters):
    model, inputs = routed("llama"), batch("llama", [2, 0, 1])
    parameters = adapters(model)
    with pytest.raises(RuntimeError, match="plain backward"):
        torch.autograd.grad(reading(head, inputs, model)[1], list(parameters.values()), allow_unused=True)
    with pytest.raises(RuntimeError, match="plain backward"):
        reading(head, inputs, model)[1].backward(inputs=list(parameters.values()))
    experts = [p for n, p in parameters.items() if ".bank." in n]
    assert all(g.any() for g in torch.autograd.grad(reading(head, inputs, model)[1], experts))


def test_an_unknown_way_into_the_model_is_refused(batch, routed):
    model = routed("llama")
    embeds = model.get_input_embeddings()(batch("llama", [0])["input_ids"])
    model._entries.remove("inputs_embeds")
    with pytest.raises(RuntimeError, match="no input embedding"):
        model(inputs_embeds=embeds, task_ids=[0])


def test_cross_attention_keys_belong_to_the_encoder_rows(batch, head, routed, close):
    """Encoder and decoder rows differ in number; the decoder reads each sequence's own encoder rows."""
    model = routed("t5", target_modules=r".*EncDecAttention\.[kv]")
    inputs = batch("t5", [2, 0, 1])
    out = head(model(**inputs))
    for i in range(3):
        close(head(model(**{n: v[i : i + 1] for n, v in inputs.items()})), out[i : i + 1])


# -- task ids -------------------------------------------------------------------------------------------------


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


# -- gates ----------------------------------------------------------------------------------------------------


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


# -- parameters -----------------------------------------------------------------------------------------------


def test_parameter_groups_hold_every_parameter_once(routed):
    model = routed("llama", router="task_mlp", task_embedding_dim=4, router_hidden_dim=4,
                   modules_to_save=["lm_head"])  # fmt: skip
    groups = model.parameter_groups()
    names = [n for ps in groups.values() for n, _ in ps]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert [n for n, _ in groups["task_embedding"]] == ["routing.router.embedding_TD"]
    assert [n for n, _ in groups["router"]] == [f"routing.router.{n}" for n in ("w1_SDF", "b1_SF", "w2_SFE", "b2_SE")]
    assert [n for n, _ in groups["saved"]] == ["base_model.lm_head.saved.weight"]
    assert len(groups["experts"]) == 28
    assert not groups["heads"]


def test_set_trainable_trains_just_these_groups(routed):
    model = routed("llama")
    assert model.set_trainable(("router",)) == ["routing.router.logits_STHE"]
    groups = model.trainable_groups()
    assert {g for g, ps in groups.items() if ps} == {"router"}
    with pytest.raises(ValueError, match="unknown group.*routers.*known are base, experts, router"):
        model.set_trainable(("routers",))


def test_a_trained_base_leaves_the_originals_of_saved_modules_alone(batch, head, routed, gradients):
    model = routed("llama", modules_to_save=["lm_head"])
    names = model.set_trainable(("base", "experts", "router", "saved"))
    assert "base_model.lm_head.original.weight" not in names
    assert "base_model.model.embed_tokens.weight" in names
    found = gradients(model, reading(head, batch("llama", [2, 0, 1]), model)[1])
    assert all(g.any() for g in found.values())


def test_print_trainable_parameters_has_pefts_form(routed, capsys):
    model = routed("llama")
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = f"{100 * trainable / total:.4f}"
    expected = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share}\n"
    assert capsys.readouterr().out == expected


def test_a_deep_copy_is_a_model_of_its_own(batch, head, routed, gradients, close):
    model, inputs = routed("t5", modules_to_save=["lm_head"]), batch("t5", [2, 0, 1])
    expected = head(model(**inputs)).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    out, loss = reading(head, inputs, twin)
    assert torch.equal(out, expected)
    assert all(g.any() for g in gradients(twin, loss).values())
    assert all(p.grad is None for p in model.parameters())


def test_a_table_of_tasks_is_kept(tiny, routed):
    table = TaskTable.from_names(NAMES)
    assert attach(tiny("llama"), CONFIG, table, dry_run=False).tasks is table
    assert attach(tiny("llama"), CONFIG, 2, dry_run=False).tasks.names == ["task-0", "task-1"]
    assert routed("llama").config.vocab_size == 61, "the base model's own attributes are at hand"
