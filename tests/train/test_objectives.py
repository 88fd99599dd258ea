from __future__ import annotations

from functools import reduce
from itertools import pairwise
from operator import add
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.objectives import Counts, count, model_inputs, step_loss, targets, task_sums, token_losses

T, V = 4, 7
TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
REDUCTIONS = ("token", "task", "sample")
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)


def make(task_type: str, B: int = 9, L: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of tasks 0, 1, 3 (2 is absent), with prompts of several lengths, and its logits."""
    gen = torch.Generator().manual_seed(0)
    task_ids = torch.tensor([0, 1, 3])[torch.randint(3, (B,), generator=gen)].sort().values
    if task_type == "SEQ_CLS":
        labels = torch.randint(V - 2, (B,), generator=gen)
        logits = torch.randn(B, V, generator=gen, dtype=torch.float64)
        logits[task_ids == 1, V - 2 :] = -torch.inf  # a task with fewer labels
    else:
        labels = torch.randint(V, (B, L), generator=gen)
        labels[torch.rand(B, L, generator=gen) < 0.4] = -100
        logits = torch.randn(B, L, V, generator=gen, dtype=torch.float64)
    return {"labels": labels, "task_ids": task_ids}, logits.requires_grad_()


def by_hand(logits: Tensor, batch: dict[str, Tensor], task_type: str, reduction: str) -> Tensor:
    """The loss spelt out with Python loops: per sequence the list of its tokens' losses."""
    sequences = []
    for b, task in enumerate(batch["task_ids"].tolist()):
        log_p = logits[b].log_softmax(-1)
        if task_type == "SEQ_CLS":
            sequences.append((task, [-log_p[batch["labels"][b]]]))
            continue
        shift = 1 if task_type == "CAUSAL_LM" else 0
        pairs = [
            (i - shift, y) for i, y in enumerate(batch["labels"][b].tolist()) if y != -100 and i >= shift
        ]
        sequences.append((task, [-log_p[i, y] for i, y in pairs]))
    sequences = [(t, losses) for t, losses in sequences if losses]
    w = WEIGHTS.tolist()
    if reduction == "token":
        n = sum(len(losses) for _, losses in sequences)
        return sum(w[t] * sum(losses) for t, losses in sequences) / n
    if reduction == "sample":
        return sum(w[t] * sum(losses) / len(losses) for t, losses in sequences) / len(sequences)
    tasks = sorted({t for t, _ in sequences})
    means = []
    for task in tasks:
        flat = [x for t, losses in sequences if t == task for x in losses]
        means.append(w[task] * sum(flat) / len(flat))
    return sum(means) / len(means)


@pytest.mark.parametrize("task_type", TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradient_by_hand(task_type: str, reduction: str) -> None:
    batch, logits = make(task_type)
    counts = count(batch, task_type, T)
    loss, _ = step_loss(logits, batch, counts, WEIGHTS, task_type=task_type, reduction=reduction)
    expected = by_hand(logits, batch, task_type, reduction)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, wanted.nan_to_num(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("task_type", TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cuts", [(3, 6), (1,), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_any_split_into_micro_batches_is_the_same_step(task_type: str, reduction: str, cuts: tuple) -> None:
    batch, logits = make(task_type)
    kwargs = {"task_type": task_type, "reduction": reduction, "label_smoothing": 0.1}
    whole, sums = step_loss(logits, batch, count(batch, task_type, T), WEIGHTS, **kwargs)
    (grad,) = torch.autograd.grad(whole, logits)
    edges = [0, *cuts, len(batch["task_ids"])]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    micro = [{k: v[part] for k, v in batch.items()} for part in parts]
    counts = reduce(add, (count(m, task_type, T) for m in micro))
    total, total_sums = torch.zeros((), dtype=torch.float64), torch.zeros(T, dtype=torch.float64)
    leaf = logits.detach().clone().requires_grad_()
    for m, part in zip(micro, parts, strict=True):
        loss, part_sums = step_loss(leaf[part], m, counts, WEIGHTS, **kwargs)
        loss.backward()
        total, total_sums = total + loss.detach(), total_sums + part_sums
    torch.testing.assert_close(total, whole.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(total_sums, sums, rtol=0, atol=1e-12)


def pack() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Three sequences (tasks 0, 2, 1; lengths 3, 4, 2), padded and packed into one row of 9."""
    gen = torch.Generator().manual_seed(1)
    lengths, tasks = [3, 4, 2], [0, 2, 1]
    logits = [torch.randn(n, V, generator=gen, dtype=torch.float64) for n in lengths]
    labels = [torch.randint(V, (n,), generator=gen) for n in lengths]
    padded = {
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        "task_ids": torch.tensor(tasks),
    }
    packed = {
        "labels": torch.cat(labels)[None],
        "task_ids": torch.tensor(tasks).repeat_interleave(torch.tensor(lengths))[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    return padded, packed, torch.nn.utils.rnn.pad_sequence(logits, batch_first=True), torch.cat(logits)[None]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded(reduction: str) -> None:
    padded, packed, padded_logits, packed_logits = pack()
    results = []
    for batch, logits in ((padded, padded_logits), (packed, packed_logits)):
        counts = count(batch, "CAUSAL_LM", T)
        assert counts.tokens_T.tolist() == [2, 1, 3, 0]  # the first token of a sequence is never a target
        assert counts.samples_T.tolist() == [1, 1, 1, 0]
        results.append(step_loss(logits, batch, counts, WEIGHTS, task_type="CAUSAL_LM", reduction=reduction))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_counts_ignore_sequences_without_targets() -> None:
    batch = {"labels": torch.tensor([[-100, 1, 2], [3, -100, -100]]), "task_ids": torch.tensor([1, 1])}
    counts = count(batch, "CAUSAL_LM", 2)  # the second sequence's only label has nothing before it
    assert counts.tokens_T.tolist() == [0, 2]
    assert counts.samples_T.tolist() == [0, 1]
    counts = count(batch, "SEQ_2_SEQ_LM", 2)
    assert counts.tokens_T.tolist() == [0, 3]
    assert counts.samples_T.tolist() == [0, 2]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_micro_batch_without_targets_keeps_the_graph(reduction: str) -> None:
    batch = {"labels": torch.full((2, 3), -100), "task_ids": torch.tensor([0, 1])}
    logits = torch.randn(2, 3, V, requires_grad=True)
    counts = Counts(torch.tensor([5, 0]), torch.tensor([2, 0]))
    loss, sums = step_loss(
        logits, batch, counts, torch.ones(2), task_type="CAUSAL_LM", reduction=reduction, label_smoothing=0.1
    )
    loss.backward()
    assert loss.item() == 0 and sums.tolist() == [0, 0]
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_label_smoothing_matches_torch_without_masked_labels() -> None:
    batch, logits = make("SEQ_2_SEQ_LM")
    losses, *_ = token_losses(logits, batch, "SEQ_2_SEQ_LM", 0.2)
    flat = batch["labels"].flatten()
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), flat, reduction="none", label_smoothing=0.2
    )
    torch.testing.assert_close(losses, wanted[flat != -100], rtol=0, atol=1e-12)


def test_label_smoothing_leaves_masked_labels_out() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    batch = {"labels": torch.tensor([0, 2]), "task_ids": torch.tensor([0, 1])}
    losses, *_ = token_losses(logits, batch, "SEQ_CLS", 0.3)
    short = torch.nn.functional.cross_entropy(logits[:1, :2], torch.tensor([0]), label_smoothing=0.3)
    torch.testing.assert_close(losses[0], short, rtol=0, atol=1e-12)
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 2] == 0


def test_half_precision_logits_are_computed_in_fp32() -> None:
    batch, logits = make("CAUSAL_LM")
    losses, *_ = token_losses(logits.detach().bfloat16(), batch, "CAUSAL_LM")
    wanted, *_ = token_losses(logits.detach().bfloat16().double(), batch, "CAUSAL_LM")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=0, atol=1e-5)


def test_sums_are_per_task_and_detached() -> None:
    batch, logits = make("CAUSAL_LM")
    losses, tasks, sequences = token_losses(logits, batch, "CAUSAL_LM")
    sums = task_sums(losses, tasks, T)
    assert sums.dtype == torch.float64 and not sums.requires_grad and sums[2] == 0
    assert sums[3].item() == pytest.approx(losses[tasks == 3].sum().item(), abs=1e-12)
    assert torch.equal(tasks, batch["task_ids"][sequences])


def test_targets_point_at_the_row_before_the_label() -> None:
    batch = {"labels": torch.tensor([[-100, -100, 5], [-100, 6, 3]]), "task_ids": torch.tensor([0, 1])}
    found = targets(batch, "CAUSAL_LM")
    assert found.rows_n.tolist() == [1, 3, 4]
    assert found.labels_n.tolist() == [5, 6, 3]
    assert found.tasks_n.tolist() == [0, 1, 1]


def test_unknown_names_are_errors() -> None:
    batch, logits = make("SEQ_CLS")
    counts = count(batch, "SEQ_CLS", T)
    with pytest.raises(ConfigError, match="tokens"):
        step_loss(logits, batch, counts, WEIGHTS, task_type="SEQ_CLS", reduction="tokens")
    with pytest.raises(ConfigError, match="CLS"):
        token_losses(logits, batch, "CLS")


def test_model_inputs_of_a_decoder_are_the_labels_shifted_right() -> None:
    config = SimpleNamespace(decoder_start_token_id=9, pad_token_id=0)
    batch = {
        "input_ids": torch.tensor([[1, 2], [3, 0]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "labels": torch.tensor([[4, 5, 6], [7, -100, -100]]),
        "task_ids": torch.tensor([0, 1]),
    }
    inputs = model_inputs(batch, "SEQ_2_SEQ_LM", config, "cpu")
    assert inputs["decoder_input_ids"].tolist() == [[9, 4, 5], [9, 7, 0]]
    assert "labels" not in inputs and inputs["use_cache"] is False
    causal = model_inputs(batch, "CAUSAL_LM", config, "cpu")
    assert set(causal) == {"input_ids", "attention_mask", "task_ids", "use_cache"}
    assert set(model_inputs(batch, "SEQ_CLS", config, "cpu")) == {"input_ids", "attention_mask", "task_ids"}
