"""generate() with prompts of several tasks in one batch, against a plain model given the same by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

TASKS = [2, 0, 1]
LENGTH = 6
SETTINGS = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "output_scores": True,
            "return_dict_in_generate": True}  # fmt: skip
PLACES = [("llama", "input"), ("gpt2", "input"), ("t5", "input"), ("llama", "layers"), ("gpt2", "layers")]


@pytest.fixture(params=PLACES, ids=lambda p: "-".join(p))
def place(request):
    return request.param


def text(batch, kind):
    inputs = batch(kind, TASKS)
    return {n: v for n, v in inputs.items() if n in ("input_ids", "attention_mask")}


def by_hand(model, kind, where, prompt, ids, **settings):
    """``generate`` of a plain model on one sequence; the cache of a prefix must be as wide as the beams."""
    if where == "layers":
        config, beams = model.config, settings.get("num_beams", 1)
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        blocks = prompt.view(len(prompt), config.num_hidden_layers, 2, heads, -1)
        cache = DynamicCache()
        for i in range(config.num_hidden_layers):
            keys, values = (blocks[:, i, w].transpose(0, 1).expand(beams, -1, -1, -1) for w in (0, 1))
            cache.update(keys, values, i)
        mask = torch.ones(1, len(prompt) + ids.shape[1], dtype=torch.long)
        # The ids before the text only stand for what the cache holds.
        longer = torch.cat([ids.new_full((1, len(prompt)), 3), ids], dim=1)
        out = model.generate(longer, attention_mask=mask, past_key_values=cache, **settings)
        return out.sequences[:, longer.shape[1] :], out
    embedded = torch.cat([prompt.unsqueeze(0), model.get_input_embeddings()(ids)], dim=1)
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    out = model.generate(inputs_embeds=embedded, attention_mask=mask, **settings)
    return out.sequences, out


@pytest.mark.parametrize("beams", [1, 4])
@torch.no_grad()
def test_mixed_tasks_equal_each_sequence_with_its_prompt(
    place, beams, bank, prompted, prompt_of, leaves, plain, batch, close
):
    kind, where = place
    model, inputs = prompted(kind, bank, where=where), text(batch, kind)
    together = model.generate(**inputs, task_ids=TASKS, num_beams=beams, **SETTINGS)
    new = together.sequences if kind == "t5" else together.sequences[:, 9:]
    assert kind == "t5" or torch.equal(together.sequences[:, :9], inputs["input_ids"])
    for i, task in enumerate(TASKS):
        prompt = prompt_of(model, leaves(model), task)
        ids = inputs["input_ids"][i : i + 1]
        tokens, alone = by_hand(plain(kind), kind, where, prompt, ids, num_beams=beams, **SETTINGS)
        assert torch.equal(new[i], tokens[0])
        assert len(together.scores) == len(alone.scores) == LENGTH
        for found, expected in zip(together.scores, alone.scores, strict=True):
            rows = found[i * beams : (i + 1) * beams]
            assert torch.equal(rows.isinf(), expected.isinf())
            close(rows.masked_fill(rows.isinf(), 0.0), expected.masked_fill(expected.isinf(), 0.0))


@torch.no_grad()
def test_prompts_tell_the_tasks_apart(place, prompted, batch):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), text(batch, kind)
    scores = [model.generate(**inputs, task_ids=[t] * 3, **SETTINGS).scores[-1].softmax(-1) for t in range(3)]
    assert (scores[0] - scores[1]).abs().max() > 1e-6
    assert (scores[0] - scores[2]).abs().max() > 1e-6


@torch.no_grad()
def test_without_a_cache_it_is_the_same(place, prompted, batch, close):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), text(batch, kind)
    cached = model.generate(**inputs, task_ids=TASKS, **SETTINGS)
    again = model.generate(**inputs, task_ids=TASKS, use_cache=False, **SETTINGS)
    assert torch.equal(cached.sequences, again.sequences)
    for found, expected in zip(cached.scores, again.scores, strict=True):
        close(found.masked_fill(found.isinf(), 0.0), expected.masked_fill(expected.isinf(), 0.0))


def test_it_needs_no_no_grad(place, bank, prompted, batch):
    kind, where = place
    model, inputs = prompted(kind, bank, where=where), text(batch, kind)
    found = model.generate(**inputs, task_ids=TASKS, **SETTINGS).sequences
    with torch.no_grad():
        assert torch.equal(found, model.generate(**inputs, task_ids=TASKS, **SETTINGS).sequences)


@pytest.mark.parametrize("place", [p for p in PLACES if p[0] != "t5"], ids=lambda p: "-".join(p))
@torch.no_grad()
def test_left_padded_text_of_unequal_length(place, prompted, batch):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), text(batch, kind)
    inputs["attention_mask"][0, :4], inputs["input_ids"][0, :4] = 0, 0
    together = model.generate(**inputs, task_ids=TASKS, num_beams=3, **SETTINGS).sequences
    short = inputs["input_ids"][:1, 4:]
    alone = model.generate(short, attention_mask=torch.ones_like(short), task_ids=TASKS[:1], num_beams=3,
                           **SETTINGS)  # fmt: skip
    assert torch.equal(together[0, -LENGTH:], alone.sequences[0, -LENGTH:])


@torch.no_grad()
def test_returned_sequences_belong_to_their_sequences_task(place, prompted, batch):
    kind, where = place
    model, inputs = prompted(kind, "prompt", where=where), text(batch, kind)
    settings = {**SETTINGS, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, task_ids=TASKS, **settings).sequences
    for i, task in enumerate(TASKS):
        one = {n: v[i : i + 1] for n, v in inputs.items()}
        alone = model.generate(**one, task_ids=[task], **settings).sequences
        assert torch.equal(together[2 * i : 2 * i + 2], alone)


def test_a_static_cache_is_refused(prompted, batch):
    model = prompted("llama", "prompt")
    with pytest.raises(ValueError, match="static cache has no room for prompts"):
        model.generate(**text(batch, "llama"), task_ids=TASKS, cache_implementation="static", **SETTINGS)
