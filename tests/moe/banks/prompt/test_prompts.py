"""Prompts in a forward pass, against a plain model that is given each sequence's prompt by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForSequenceClassification, T5EncoderModel

from taskmoe.moe import RowSpaceError
from taskmoe.moe.context import use

ROWS = [2, 0, 1, 0]
PLACES = [(k, "input") for k in ("llama", "gpt2", "t5", "bert")] + [
    (k, "layers") for k in ("llama", "gpt2", "bert")
]


@pytest.fixture(params=PLACES, ids=lambda p: "-".join(p))
def place(request):
    """Runs a test once an architecture and a place for the prompt."""
    return request.param


def one(inputs, i):
    return {n: v[i : i + 1] for n, v in inputs.items() if n != "task_ids"}


def test_the_formula_and_its_gradients(
    place, bank, prompted, prompt_of, by_hand, leaves, batch, head, gradients, close
):
    kind, where = place
    model, inputs = prompted(kind, bank, where=where), batch(kind, ROWS)
    found = head(model(**inputs))
    weights = torch.randn_like(found)
    tensors = leaves(model)
    expected = torch.stack([
        by_hand(kind, where, prompt_of(model, tensors, task), one(inputs, i)) for i, task in enumerate(ROWS)
    ])  # fmt: skip
    close(found, expected, 1e-12)
    (expected * weights).sum().backward()
    close(gradients(model, (found * weights).sum()), {n: p.grad for n, p in tensors.items()}, 1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(
    place, bank, mode, prompted, batch, head, gradients, close, checkpoint
):
    kind, where = place
    model, inputs = prompted(kind, bank, where=where).train(), batch(kind, ROWS)
    plain = head(model(**inputs))
    weights = torch.randn_like(plain)
    expected = gradients(model, (plain * weights).sum())
    checkpoint(model, mode)
    for _ in range(2):
        out = head(model(**inputs))
        close(out, plain, 1e-12)
        model(**batch(kind, [1, 1]))  # another forward pass before this one's backward
        close(gradients(model, (out * weights).sum()), expected, 1e-12)


def test_two_backward_passes_on_one_graph(place, prompted, batch, head, gradients, close):
    kind, where = place
    model, inputs = prompted(kind, "prompt_bank", where=where), batch(kind, ROWS)
    out = head(model(**inputs))
    parts = [out[i].square().sum() for i in range(4)]
    for part in parts:
        part.backward(retain_graph=True)
    together = gradients(model)
    close(together, gradients(model, head(model(**inputs)).square().sum()), 1e-12)


# Positions of encoders count from the left edge, with a prompt or without: they are padded on the right.
SIDES = [(k, w, "right") for k, w in PLACES] + [(k, w, "left") for k, w in PLACES if k in ("llama", "gpt2")]


@pytest.mark.parametrize("case", SIDES, ids=lambda c: "-".join(c))
def test_padding_moves_nothing(case, prompted, batch, head, close):
    kind, where, side = case
    model, inputs = prompted(kind, "prompt", where=where), batch(kind, ROWS)
    text = slice(4, None) if side == "left" else slice(None, 5)
    padded = {n: v.clone() for n, v in inputs.items()}
    padding = slice(None, 4) if side == "left" else slice(5, None)
    padded["input_ids"][1, padding], padded["attention_mask"][1, padding] = 0, 0
    short = {n: v[1:2, text] if n in ("input_ids", "attention_mask") else v[1:2] for n, v in inputs.items()}
    with torch.no_grad():
        whole, alone = head(model(**padded)), head(model(**short))
    if kind == "t5":
        close(whole[1], alone[0], 1e-12)
    elif kind == "bert":
        close(whole[1, :5], alone[0, :5], 1e-12)
        close(whole[1, -1], alone[0, -1], 1e-12)  # the pooler's output
    else:
        close(whole[1, text], alone[0], 1e-12)
    close(whole[2:], head(model(**inputs))[2:], 1e-12)


@pytest.mark.parametrize("place", [p for p in PLACES if p[0] in ("llama", "gpt2")], ids=lambda p: "-".join(p))
def test_a_mask_of_ones_and_given_positions_are_the_default(place, prompted, batch, head, close):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), batch(kind, ROWS)
    expected = head(model(**inputs))
    positions = torch.arange(9).expand(4, -1)
    close(head(model(**inputs, position_ids=positions)), expected, 1e-12)
    del inputs["attention_mask"]
    close(head(model(**inputs)), expected, 1e-12)
    close(head(model(**inputs, use_cache=False)), expected, 1e-12)
    ids = inputs.pop("input_ids")
    embedded = model.base_model.get_input_embeddings()(ids)
    close(head(model(inputs_embeds=embedded, **inputs)), expected, 1e-12)


@pytest.mark.parametrize("place", [p for p in PLACES if p[0] in ("llama", "gpt2")], ids=lambda p: "-".join(p))
@torch.no_grad()
def test_a_text_in_two_parts_is_the_text(place, prompted, batch, head, close):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), batch(kind, ROWS)
    expected = head(model(**inputs))
    first = {n: v[:, :6] if v.dim() == 2 else v for n, v in inputs.items()}
    out = model(**first, use_cache=True)
    close(head(out), expected[:, :6], 1e-12)
    rest = {**inputs, "input_ids": inputs["input_ids"][:, 6:]}
    close(head(model(**rest, past_key_values=out.past_key_values)), expected[:, 6:], 1e-12)


def test_the_caller_sees_the_text_alone(place, prompted, batch):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), batch(kind, ROWS)
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    states = out.decoder_hidden_states if kind == "t5" else out.hidden_states
    wanted = inputs["decoder_input_ids" if kind == "t5" else "input_ids"].shape
    assert {s.shape[:2] for s in states} == {wanted}
    assert out.get("past_key_values") is None
    first = model(**inputs, return_dict=False)[0]
    assert torch.equal(first, out.last_hidden_state if kind == "bert" else out.logits)


def test_a_loss_of_the_model_is_that_of_the_texts_labels(prompted, batch):
    model, inputs = prompted("llama", "prompt"), batch("llama", ROWS)
    out = model(**inputs, labels=inputs["input_ids"])
    targets = inputs["input_ids"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).double(), targets)
    assert abs(out.loss.item() - expected.item()) < 1e-6


@pytest.mark.parametrize("where", ["input", "layers"])
def test_classifiers_read_their_place_in_the_text(where, tiny, prompted, batch, close):
    ids = batch("llama", ROWS)["input_ids"]
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    for name in ("llama", "bert"):
        config = tiny(name).config
        config.num_labels, config.pad_token_id = 3, 0
        torch.manual_seed(1)
        kind = {"llama": LlamaForSequenceClassification, "bert": BertForSequenceClassification}[name]
        model = prompted(name, "prompt", base=kind(config), where=where)
        found = model(input_ids=ids, attention_mask=mask, task_ids=ROWS).logits
        short = model(input_ids=ids[1:2, :5], attention_mask=mask[1:2, :5], task_ids=ROWS[1:2]).logits
        close(found[1], short[0], 1e-12)
        body = model.base_model.model if name == "llama" else model.base_model.bert
        with torch.no_grad():
            head = model.base_model
            with use(model.context(ROWS)):
                out = body(input_ids=ids, attention_mask=mask)
            last = mask.sum(1) - 1
            read = out.last_hidden_state[torch.arange(4), last] if name == "llama" else out.pooler_output
            expected = head.score(read) if name == "llama" else head.classifier(read)
        assert out.last_hidden_state.shape[:2] == ids.shape
        close(found, expected, 1e-12)


def test_an_encoder_alone(tiny, prompted, prompt_of, leaves, batch, close):
    base = tiny("t5")
    encoder = T5EncoderModel(base.config).double().eval()
    encoder.load_state_dict(base.state_dict(), strict=False)
    inputs = batch("bert", ROWS)
    model = prompted("t5", "prompt", base=encoder)
    found = model(**inputs).last_hidden_state
    tensors = leaves(model)
    with model.disable_adapter():
        for i, task in enumerate(ROWS):
            both = torch.cat([prompt_of(model, tensors, task), encoder.shared(inputs["input_ids"][i])])
            alone = model(inputs_embeds=both.unsqueeze(0), task_ids=[task]).last_hidden_state
            close(found[i], alone[0, 3:], 1e-12)


def test_without_the_adapter_it_is_the_base(place, prompted, plain, batch, head):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), batch(kind, ROWS)
    rest = {n: v for n, v in inputs.items() if n != "task_ids"}
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(head(model(**inputs)), head(plain(kind)(**rest)))


@pytest.mark.parametrize("where", ["input", "layers"])
def test_uniform_gates_average_the_bank(where, prompted, by_hand, batch, head, close):
    model, inputs = prompted("gpt2", "prompt_bank", where=where), batch("gpt2", ROWS)
    mean = model.prompts.bank.prompts_ElW.mean(0)
    with model.uniform_gates():
        found = head(model(**inputs))
    close(found, torch.stack([by_hand("gpt2", where, mean, one(inputs, i)) for i in range(4)]), 1e-12)


@pytest.mark.parametrize("place", PLACES, ids=lambda p: "-".join(p))
def test_a_base_in_bf16_computes_in_bf16(place, prompted, tiny, batch, head):
    kind, where = place
    model = prompted(kind, "prompt", where=where).float()
    inputs = batch(kind, ROWS)
    expected = head(model(**inputs))
    model.base_model.to(torch.bfloat16)
    found = head(model(**inputs))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    found.float().square().sum().backward()
    assert model.prompts.bank.prompts_TlW.grad.dtype == torch.float32


def test_packed_rows_are_refused(prompted, batch):
    inputs = batch("llama", ROWS)
    inputs["task_ids"] = torch.tensor(ROWS).unsqueeze(1).expand(4, 9)
    with pytest.raises(RowSpaceError, match=r"packed task_ids .* turn packing off"):
        prompted("llama", "prompt")(**inputs)


def test_other_masks_are_refused(prompted, batch):
    inputs = batch("llama", ROWS)
    inputs["attention_mask"] = torch.ones(4, 1, 9, 9)
    with pytest.raises(ValueError, match=r"attention_mask is \(4, 1, 9, 9\)"):
        prompted("llama", "prompt")(**inputs)


def test_what_an_encoder_made_without_a_prompt_is_refused(prompted, plain, batch):
    inputs = batch("t5", ROWS)
    made = plain("t5").encoder(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="encoder_outputs were made without prompts"):
        prompted("t5", "prompt")(encoder_outputs=made, **inputs)
