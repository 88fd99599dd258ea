"""Heads per task: each against plain linears of its own, and inside real classification models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from taskmoe.moe import ConfigError, RowSpaceError, TaskError, TaskMoEConfig, TaskTable, attach, attach_heads
from taskmoe.moe.context import Context, use
from taskmoe.moe.heads import MeanPoolClassifier, TaskLinear

LABELS = {"two": "ab", "four": "abcd", "three": "abc"}
COUNTS = [2, 4, 3]
TASKS = [2, 0, 2, 1]
CONFIG = TaskMoEConfig(r=2, num_experts=3)


@pytest.fixture
def table():
    found = TaskTable()
    for name, labels in LABELS.items():
        found.add(name, list(labels))
    return found


def separate(stacked, task):
    """A plain linear with the numbers of one task."""
    _, N, K = stacked.weight_TNK.shape
    linear = nn.Linear(K, N, bias=stacked.bias_TN is not None).to(stacked.weight_TNK.dtype)
    with torch.no_grad():
        linear.weight.copy_(stacked.weight_TNK[task])
        if stacked.bias_TN is not None:
            linear.bias.copy_(stacked.bias_TN[task])
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)])
def test_equal_to_a_linear_per_task(shape, bias, close):
    stacked = TaskLinear(nn.Linear(6, 3, bias=bias), 4, "head").double()
    with torch.no_grad():
        for p in stacked.parameters():
            p.normal_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape[:-1], 3, dtype=torch.float64)
    with use(Context(TASKS)):
        out = stacked(x)
    (out * weights).sum().backward()
    dx, x.grad = x.grad, None
    linears = [separate(stacked, t) for t in range(4)]
    expected = torch.stack([linears[t](row) for t, row in zip(TASKS, x, strict=True)])
    (expected * weights).sum().backward()
    close(out, expected, 1e-12)
    close(dx, x.grad, 1e-12)
    for t, linear in enumerate(linears):
        absent = t == 3
        assert bool(stacked.weight_TNK.grad[t].any()) is not absent, "absent tasks get zeros, not None"
        if not absent:
            close(stacked.weight_TNK.grad[t], linear.weight.grad, 1e-12)
            assert not bias or torch.allclose(stacked.bias_TN.grad[t], linear.bias.grad)


def test_all_tasks_start_as_the_original():
    linear = nn.Linear(6, 3).bfloat16()
    stacked = TaskLinear(linear, 4, "head")
    assert stacked.weight_TNK.dtype == torch.float32
    for t in range(4):
        assert torch.equal(stacked.weight_TNK[t], linear.weight.float())
        assert torch.equal(stacked.bias_TN[t], linear.bias.float())


def test_outputs_beyond_a_tasks_labels_are_minus_infinity():
    stacked = TaskLinear(nn.Linear(6, 4), 3, "head", COUNTS)
    with use(Context(TASKS)):
        out = stacked(torch.randn(4, 6))
    for row, task in zip(out, TASKS, strict=True):
        assert row[: COUNTS[task]].isfinite().all()
        assert (row[COUNTS[task] :] == -math.inf).all()
    assert "beyond_TN" not in stacked.state_dict()
    nn.functional.cross_entropy(out, torch.tensor([2, 1, 0, 3])).backward()
    assert stacked.weight_TNK.grad.isfinite().all()
    assert not stacked.weight_TNK.grad[0, 2:].any(), "labels that a task does not have never train"


def test_packed_rows_choose_their_head_by_position(close):
    stacked = TaskLinear(nn.Linear(6, 3), 3, "head")
    with torch.no_grad():
        stacked.weight_TNK.normal_()
    x = torch.randn(1, 4, 6)
    with use(Context([[2, 2, 0, 1]])):
        out = stacked(x)
    close(out[0], torch.stack([separate(stacked, t)(r) for t, r in zip([2, 2, 0, 1], x[0], strict=True)]))


def test_without_a_context_or_with_too_many_rows():
    stacked = TaskLinear(nn.Linear(6, 3), 3, "classifier")
    with pytest.raises(TaskError, match="classifier: no tasks are known here"):
        stacked(torch.randn(4, 6))
    with use(Context([0, 1, 2])), pytest.raises(RowSpaceError, match="classifier: 4 rows"):
        stacked(torch.randn(4, 6))


def build(kind, tiny):
    torch.manual_seed(0)
    if kind == "roberta":
        config = RobertaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                               intermediate_size=24, max_position_embeddings=32, num_labels=4)  # fmt: skip
        return RobertaForSequenceClassification(config).eval()
    config = tiny(kind).config
    config.num_labels = 4
    torch.manual_seed(0)
    return {"bert": BertForSequenceClassification, "llama": LlamaForSequenceClassification}[kind](
        config
    ).eval()


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("bert", ["classifier"]),
        ("llama", ["score"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_a_models_own_head_per_task(kind, heads, tiny, table, batch, shaken, close):
    inputs = batch(kind, TASKS)
    tasks = inputs.pop("task_ids")
    expected = build(kind, tiny)(**inputs).logits
    model = attach(attach_heads(build(kind, tiny), table), CONFIG, table)
    found = [n for n, m in model.base_model.named_modules() if isinstance(m, TaskLinear)]
    assert found == heads
    assert not set(heads) & set(model.routing.groups)
    out = model(**inputs, task_ids=tasks).logits
    kept = ~out.isinf()
    close(out[kept], expected[kept])
    assert kept.sum(1).tolist() == [COUNTS[t] for t in TASKS]

    shaken(model)
    out = model(**inputs, task_ids=tasks).logits
    for name in heads:  # each sequence alone, with plain linears in place of the stacked ones
        stacked = model.base_model.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        for i, task in enumerate(TASKS):
            setattr(model.base_model.get_submodule(parent), leaf, separate(stacked, task))
            one = model(**{n: v[i : i + 1] for n, v in inputs.items()}, task_ids=[task]).logits[0]
            close(one[: COUNTS[task]], out[i, : COUNTS[task]])
        setattr(model.base_model.get_submodule(parent), leaf, stacked)


def test_the_mask_is_on_the_last_of_several_linears():
    """Also where an earlier one happens to be as wide as there are labels."""
    table = TaskTable()
    table.add("eight", list("abcdefgh"))
    table.add("two", ["a", "b"])
    config = RobertaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=8, max_position_embeddings=32, num_labels=8)  # fmt: skip
    model = attach(attach_heads(RobertaForSequenceClassification(config).eval(), table), CONFIG, table)
    out = model(input_ids=torch.randint(4, 61, (2, 5)), task_ids=["eight", "two"]).logits
    assert out.isfinite().sum(1).tolist() == [8, 2]


@pytest.mark.parametrize("kind", ["bert", "llama", "roberta"])
def test_heads_train_whatever_tasks_the_batch_holds(kind, tiny, table, batch, shaken, gradients):
    model = shaken(attach(attach_heads(build(kind, tiny), table), CONFIG, table))
    loss = nn.functional.cross_entropy(model(**batch(kind, [1, 1])).logits, torch.tensor([3, 0]))
    found = gradients(model, loss)
    for name, _ in model.trainable_groups()["heads"]:
        per_task = found[name].flatten(1).any(1).tolist()
        assert per_task == [False, True, False], name


def test_the_mean_of_the_attended_positions(tiny, table, batch, close):
    encoder = tiny("bert").eval()
    model = attach_heads(encoder, table, "mean")
    assert isinstance(model, MeanPoolClassifier)
    inputs = batch("bert", TASKS)
    tasks = inputs.pop("task_ids")
    lengths = [9, 4, 1, 6]
    inputs["attention_mask"] = (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).long()
    hidden = encoder(**inputs).last_hidden_state
    attached = attach(model, CONFIG, table)
    assert not any("classifier" in g for g in attached.routing.groups)
    out = attached(**inputs, task_ids=tasks).logits
    for i, (task, length) in enumerate(zip(TASKS, lengths, strict=True)):
        pooled = sum(hidden[i, j] for j in range(length)) / length
        count = COUNTS[task]
        close(out[i, :count], separate(model.classifier, task)(pooled)[:count])
        assert out[i, count:].isinf().all()
    assert model.config is encoder.config
    assert model.base_model is encoder


def test_mean_pooling_starts_like_a_head_of_the_model(tiny, table):
    head = attach_heads(tiny("bert"), table, "mean").classifier
    assert not head.bias_TN.any()
    assert float(head.weight_TNK.detach()[0].std()) == pytest.approx(0.02, rel=0.3)
    assert torch.equal(head.weight_TNK[0], head.weight_TNK[2])


@pytest.mark.parametrize(
    ("labels", "pooling", "num_labels", "message"),
    [
        (LABELS, "cls", 4, "pooling: 'cls' is unknown; known are model, mean"),
        ({**LABELS, "none": None}, "model", 4, "SEQ_CLS needs labels; tasks without: none"),
        (
            LABELS,
            "model",
            3,
            "num_labels 3, the largest task has 4 labels; build the model with num_labels=4",
        ),
    ],
)
def test_heads_that_cannot_be_made(labels, pooling, num_labels, message, tiny):
    table = TaskTable()
    for name, row in labels.items():
        table.add(name, row)
    config = tiny("bert").config
    config.num_labels = num_labels
    with pytest.raises(ConfigError, match=message):
        attach_heads(BertForSequenceClassification(config), table, pooling)


def test_a_model_without_a_head(tiny, table):
    with pytest.raises(ConfigError, match="BertModel has no classification head; use pooling: mean"):
        attach_heads(tiny("bert"), table)
