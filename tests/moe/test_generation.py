"""generate() with several tasks in one batch, against each sequence alone in the dense model of its task."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import RowSpaceError

TASKS = [2, 0, 1]
KINDS = ("llama", "gpt2", "t5")
LENGTH = 6
SETTINGS = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "output_scores": True,
            "return_dict_in_generate": True}  # fmt: skip


@pytest.fixture
def prompts(batch):
    def make(kind):
        inputs = batch(kind, TASKS)
        return {n: v for n, v in inputs.items() if n in ("input_ids", "attention_mask")}

    return make


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_tasks_equal_each_sequence_in_its_dense_model(kind, beams, routed, dense, prompts, close):
    model, inputs = routed(kind), prompts(kind)
    together = model.generate(**inputs, task_ids=TASKS, num_beams=beams, **SETTINGS)
    for i, task in enumerate(TASKS):
        one = {n: v[i : i + 1] for n, v in inputs.items()}
        alone = dense(kind, model, task).generate(**one, num_beams=beams, **SETTINGS)
        assert torch.equal(together.sequences[i], alone.sequences[0])
        assert len(together.scores) == len(alone.scores) == LENGTH
        for found, expected in zip(together.scores, alone.scores, strict=True):
            rows = found[i * beams : (i + 1) * beams]
            assert torch.equal(rows.isinf(), expected.isinf())
            close(rows.masked_fill(rows.isinf(), 0.0), expected.masked_fill(expected.isinf(), 0.0))
        if beams > 1:
            close(together.sequences_scores[i], alone.sequences_scores[0])


@pytest.mark.parametrize("kind", KINDS)
def test_returned_sequences_belong_to_their_sequences_task(kind, routed, dense, prompts):
    model, inputs = routed(kind), prompts(kind)
    settings = {**SETTINGS, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, task_ids=TASKS, **settings).sequences
    for i, task in enumerate(TASKS):
        one = {n: v[i : i + 1] for n, v in inputs.items()}
        assert torch.equal(
            together[2 * i : 2 * i + 2], dense(kind, model, task).generate(**one, **settings).sequences
        )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_one_prompt_keep_its_task(kind, routed, dense, prompts):
    model, inputs = routed(kind), prompts(kind)
    one = {n: v[1:2] for n, v in inputs.items()}
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": LENGTH}
    plain = dense(kind, model, TASKS[1])
    torch.manual_seed(0)
    found = model.generate(**one, task_ids=[TASKS[1]], **settings)
    torch.manual_seed(0)
    assert torch.equal(found, plain.generate(**one, **settings))


def test_left_padded_prompts_of_unequal_length(routed, dense, prompts):
    model, inputs = routed("llama"), prompts("llama")
    inputs["attention_mask"][0, :4], inputs["input_ids"][0, :4] = 0, 0
    together = model.generate(**inputs, task_ids=TASKS, **SETTINGS).sequences
    short = inputs["input_ids"][:1, 4:]
    alone = dense("llama", model, TASKS[0]).generate(short, attention_mask=torch.ones_like(short), **SETTINGS)
    assert torch.equal(together[0, -LENGTH:], alone.sequences[0, -LENGTH:])


def test_without_adapters_the_base_generates(tiny, routed, prompts):
    model, inputs = routed("llama"), prompts("llama")
    expected = tiny("llama").eval().generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False), expected)


def test_the_prompt_may_be_positional(routed, prompts):
    model, inputs = routed("llama"), prompts("llama")
    expected = model.generate(**inputs, task_ids=TASKS, **SETTINGS).sequences
    ids = inputs.pop("input_ids")
    assert torch.equal(model.generate(ids, **inputs, task_ids=TASKS, **SETTINGS).sequences, expected)


def test_packed_prompts_cannot_go_on(routed, prompts):
    inputs = prompts("llama")
    packed = torch.tensor(TASKS).unsqueeze(1).expand(3, 9)
    with pytest.raises(RowSpaceError, match=r"3 rows .* task_ids name 27 positions"):
        routed("llama").generate(**inputs, task_ids=packed, **SETTINGS)
