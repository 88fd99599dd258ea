"""The tasks of one forward pass and its backward: row spaces, recomputes, several forwards, threads."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.utils.checkpoint
from transformers import WhisperConfig, WhisperForConditionalGeneration

from taskmoe.moe import RowSpaceError, TaskError, TaskMoEConfig, attach, bind
from taskmoe.moe.context import Context, current, use

CONFIG = TaskMoEConfig(r=2, num_experts=3, router_init_std=0.5)
NAMES = ["sort", "sum", "translate"]
MODES = ("none", "reentrant", "non-reentrant")


def test_rows_belong_to_sequences_in_order():
    context = Context([5, 2, 2])
    assert context.tasks == [2, 5]
    assert context.plan((3, 4), "q").segments() == [(1, 0, 4), (0, 4, 12)]
    assert context.plan((3,), "pooler").segments() == [(1, 0, 1), (0, 1, 3)]
    assert context.plan((6, 1), "beams").segments() == [(1, 0, 2), (0, 2, 6)]
    assert context.plan((12,), "flat") is context.plan((3, 4), "q"), "one plan a row space"


def test_packed_rows_have_a_task_each():
    context = Context([[5, 5, 2], [2, 7, 7]])
    assert context.tasks == [2, 5, 7]
    assert context.plan((2, 3), "q").segments() == [(1, 0, 2), (0, 2, 4), (2, 4, 6)]


@pytest.mark.parametrize("lead", [(4,), (2, 4), (0,), ()])
def test_rows_that_do_not_split_name_the_module(lead):
    with pytest.raises(RowSpaceError, match=r"encoder\.pooler: \d+ rows .* 3 sequences .* exclude_modules"):
        Context([0, 1, 2]).plan(lead, "encoder.pooler")


def test_a_pooler_of_packed_rows_names_the_module():
    with pytest.raises(RowSpaceError, match=r"pooler: 2 rows .* 6 positions.*exclude_modules"):
        Context([[0, 0, 1], [1, 1, 1]]).plan((2,), "pooler")


def test_a_bound_function_keeps_its_context():
    with pytest.raises(TaskError, match="layer: no tasks are known here"):
        current("layer")
    one, two = Context([0]), Context([1])
    with use(one):
        bound = bind(current)
        assert bound("layer") is one
    assert bound("layer") is one
    with use(two):
        assert bound("layer") is one
        assert current("layer") is two
    assert bind(current) is current, "nothing to keep"


def test_a_functions_own_checkpointing_needs_bind(batch, routed, reading, gradients, close):
    """The way to use torch.utils.checkpoint around layers that transformers does not checkpoint."""
    model, inputs = routed("llama"), batch("llama", [2, 0, 1])
    expected = gradients(model, reading(model, inputs)[1])
    for layer in model.base_model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, f=mlp.forward: torch.utils.checkpoint.checkpoint(
            bind(f), x, use_reentrant=False
        )
    close(gradients(model, reading(model, inputs)[1]), expected)


@pytest.mark.parametrize("compose", ["after", "before"])
def test_checkpointing_none_reentrant_and_not_are_equal(
    kind, compose, batch, routed, gradients, close, checkpoint, reading
):
    inputs, found = batch(kind, [2, 0, 1, 0]), {}
    for mode in MODES:
        model = checkpoint(routed(kind, compose=compose), mode)
        out, loss = reading(model, inputs)
        found[mode] = out, gradients(model, loss)
    for mode in MODES[1:]:
        close(found[mode][0], found["none"][0])
        close(found[mode][1], found["none"][1])


@pytest.mark.filterwarnings("ignore:None of the inputs")  # torch's, about the reentrant evaluation in between
@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_then_one_backward(kind, mode, batch, routed, gradients, close, checkpoint, reading):
    """A recompute belongs to its own forward, whatever ran since: other tasks, other sizes, an evaluation."""
    model = checkpoint(routed(kind), mode)
    one, two, other = (
        batch(kind, [2, 0, 1]),
        batch(kind, [1, 2], length=7, seed=1),
        batch(kind, [0] * 4, seed=2),
    )
    reading(model, one)[1].backward()
    reading(model, two)[1].backward()
    expected = gradients(model)
    first = reading(model, one)[1]
    with torch.no_grad():
        model(**other)
        with model.disable_adapter():
            model(**other)
    second = reading(model, two)[1]
    with model.uniform_gates(), torch.no_grad():
        model(**other)
    close(gradients(model, first + second), expected)


@pytest.mark.parametrize("mode", MODES)
def test_backward_on_another_thread(mode, batch, routed, gradients, close, checkpoint, reading):
    model, inputs = checkpoint(routed("llama"), mode), batch("llama", [2, 0, 1])
    expected = gradients(model, reading(model, inputs)[1])
    loss, errors = reading(model, inputs)[1], []

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


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_frozen_routers_leave_the_experts_their_gradient(
    mode, embedded, batch, routed, gradients, close, checkpoint, reading
):
    """Reentrant checkpointing needs an input that requires grad: the routers otherwise see to it."""
    model, inputs = routed("llama"), batch("llama", [2, 0, 1])
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    expected = gradients(model, reading(model, inputs)[1])
    names = checkpoint(model, mode).set_trainable(("experts",))
    assert names == [n for n in expected if ".bank." in n]
    found = gradients(model, reading(model, inputs)[1])
    close(found, {n: expected[n] for n in names})


def test_a_second_backward_on_a_retained_graph_doubles(kind, batch, routed, close, reading):
    model = routed(kind)
    loss = reading(model, batch(kind, [2, 0, 1]))[1]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in trained.items()}
    loss.backward()
    close({n: p.grad for n, p in trained.items()}, {n: 2 * g for n, g in once.items()})


@pytest.mark.parametrize("mode", MODES)
def test_inputs_embeds_train_the_routers_too(
    kind, mode, batch, routed, gradients, close, checkpoint, reading
):
    model, inputs = checkpoint(routed(kind), mode), batch(kind, [2, 0, 1])
    expected = gradients(model, reading(model, inputs)[1])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = embeds
    if kind == "t5":
        inputs["decoder_inputs_embeds"] = model.get_input_embeddings()(
            inputs.pop("decoder_input_ids")
        ).detach()
    close(gradients(model, reading(model, inputs)[1]), expected)


def test_positional_arguments_are_the_models_own(batch, head, routed, gradients, close, reading):
    model, inputs = routed("bert"), batch("bert", [2, 0, 1])
    expected = gradients(model, reading(model, inputs)[1])
    out = head(model(inputs["input_ids"], inputs["attention_mask"], task_ids=[2, 0, 1]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    close(gradients(model, (out * weights.float()).sum()), expected)
    with pytest.raises(TypeError, match="do not fit"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"], task_ids=[2, 0, 1])


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("mode", MODES)
def test_floating_inputs_beside_an_embedding_train_the_routers(mode, shaken, gradients, close, checkpoint):
    """Whisper's encoder reads features, its decoder token embeddings: both paths end in a bridge."""
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=61, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=1, dropout=0.0,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_source_positions=6, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
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


def test_gradients_asked_for_by_other_means_are_refused_not_zero(batch, routed, adapters, reading):
    model, inputs = routed("llama"), batch("llama", [2, 0, 1])
    parameters = adapters(model)
    with pytest.raises(RuntimeError, match="plain backward"):
        torch.autograd.grad(reading(model, inputs)[1], list(parameters.values()), allow_unused=True)
    with pytest.raises(RuntimeError, match="plain backward"):
        reading(model, inputs)[1].backward(inputs=list(parameters.values()))
    experts = [p for n, p in parameters.items() if ".bank." in n]
    assert all(g.any() for g in torch.autograd.grad(reading(model, inputs)[1], experts))


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
