"""The loss: sum over tasks of w_t S_t / N, whatever the split into micro-batches and ranks.

S_t is the loss sum of task t over a whole optimiser step (all ranks, all accumulation), N the step's number
of target tokens. Because N counts the whole step, it must be known before the first backward pass:
:func:`count` reads it from the labels alone; the caller adds the counts over micro-batches and ranks.

Shapes: B sequences, L positions (Lt of the decoder), V vocabulary or labels, T tasks, n targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taskmoe.moe.config import ConfigError
from taskmoe.train.contrastive import batch_losses

IGNORE = -100
REDUCTIONS = ("token", "task", "sample")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
ONE_TARGET = ("SEQ_CLS", "FEATURE_EXTRACTION")  # a label, or a query's own text, a sequence


def model_inputs(
    batch: Mapping[str, Any], task_type: str, model_config: Any, device: torch.device | str
) -> dict[str, Any]:
    """What of a batch the model's forward takes, on ``device``; task ids stay on the CPU, labels away.

    A decoder reads the labels shifted right by one, after ``model_config.decoder_start_token_id``.

    Args:
        batch: ``input_ids``, ``task_ids``, ``labels``, perhaps ``attention_mask``, ``position_ids``,
            ``instance_embeddings``.
        task_type: CAUSAL_LM | SEQ_2_SEQ_LM | SEQ_CLS.
        model_config: of the Hugging Face model.
    """
    wanted = ("input_ids", "attention_mask", "position_ids", "instance_embeddings")
    names = [n for n in wanted if n in batch]
    inputs: dict[str, Any] = {n: batch[n].to(device) for n in names}
    inputs["task_ids"] = batch["task_ids"]
    if task_type == "SEQ_2_SEQ_LM":
        labels_BL = batch["labels"].to(device)
        start = labels_BL.new_full((labels_BL.shape[0], 1), model_config.decoder_start_token_id)
        shifted_BL = torch.cat([start, labels_BL[:, :-1]], dim=1)
        # What stands behind the last target is never scored, so any id will do.
        inputs["decoder_input_ids"] = shifted_BL.masked_fill(
            shifted_BL == IGNORE, model_config.pad_token_id or 0
        )
    if task_type not in ONE_TARGET:
        inputs["use_cache"] = False  # nothing is generated; with a cache, packed rows would see each other
    return inputs


@dataclass(frozen=True)
class Counts:
    """What a step holds, per task. Counts add: over micro-batches, and over ranks by an all-reduce.

    ``tokens_T``, ``samples_T``: int64 [T]; target tokens, and sequences with at least one target token.
    """

    tokens_T: Tensor
    samples_T: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens_T + other.tokens_T, self.samples_T + other.samples_T)

    def to(self, device: torch.device | str) -> Counts:
        return Counts(self.tokens_T.to(device), self.samples_T.to(device))


@dataclass(frozen=True)
class Targets:
    """Where a batch has targets, one entry a target, in the order of the batch (all int64 [n]).

    ``rows_n`` indexes the flattened logits ([B * L, V]), ``labels_n`` is the right class, ``tasks_n`` its
    task, ``sequences_n`` its sequence (packed rows hold several).
    """

    rows_n: Tensor
    labels_n: Tensor
    tasks_n: Tensor
    sequences_n: Tensor


def targets(batch: Mapping[str, Any], task_type: str) -> Targets:
    """Find the positions whose logits predict a label.

    Args:
        batch: ``labels`` [B, L] (CAUSAL_LM: aligned with the input, shifted here), [B, Lt] (SEQ_2_SEQ_LM) or
            [B] (SEQ_CLS; FEATURE_EXTRACTION: of queries), int64, -100 where there is none; ``task_ids`` [B],
            or [B, L] in packed batches, which also have ``position_ids`` [B, L] that restart at 0 with each
            sequence.
        task_type: one of ``TASK_TYPES``.

    Raises:
        ConfigError: an unknown task type.
    """
    if task_type not in TASK_TYPES:
        raise ConfigError(f"task_type: {task_type!r} is none of {', '.join(TASK_TYPES)}")
    labels, device = batch["labels"], batch["labels"].device
    task_ids = batch["task_ids"].to(device)
    labels_BL = labels.unsqueeze(1) if task_type in ONE_TARGET else labels
    L = labels_BL.shape[1]
    starts_BL = torch.zeros_like(labels_BL, dtype=torch.bool)
    starts_BL[:, 0] = True
    if task_ids.dim() == 2:
        starts_BL |= batch["position_ids"].to(device) == 0
    has_BL = labels_BL != IGNORE
    if task_type == "CAUSAL_LM":
        has_BL = has_BL & ~starts_BL  # nothing precedes the first token of a sequence
    where_n = has_BL.flatten().nonzero().squeeze(1)
    sequences = torch.cumsum(starts_BL.flatten(), 0) - 1
    tasks = task_ids.flatten() if task_ids.dim() == 2 else task_ids.repeat_interleave(L)
    return Targets(
        rows_n=where_n - 1 if task_type == "CAUSAL_LM" else where_n,
        labels_n=labels_BL.flatten()[where_n],
        tasks_n=tasks[where_n],
        sequences_n=sequences[where_n],
    )


def count(batch: Mapping[str, Any], task_type: str, n_tasks: int) -> Counts:
    """Target tokens and sequences per task of one micro-batch, from its labels (before any forward pass)."""
    found = targets(batch, task_type)
    tokens_T = torch.bincount(found.tasks_n, minlength=n_tasks)
    fresh_n = torch.ones_like(found.sequences_n, dtype=torch.bool)
    fresh_n[1:] = found.sequences_n[1:] != found.sequences_n[:-1]  # positions come sequence after sequence
    return Counts(tokens_T, torch.bincount(found.tasks_n[fresh_n], minlength=n_tasks))


def token_losses(
    logits: Tensor, batch: Mapping[str, Any], task_type: str, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every target.

    Only the rows of ``logits`` that have a target are copied, so the cost follows the targets alone.
    With label smoothing eps the loss is (1 - eps) * nll + eps * mean of -log p over the classes whose logit
    is not -inf (heads of fewer labels are padded with -inf).

    Args:
        logits: [B, L, V], or [B, V] (SEQ_CLS), floating point; bf16 and fp16 are computed in fp32.
            FEATURE_EXTRACTION: the texts' vectors [B, D]; see :func:`taskmoe.train.contrastive.info_nce`.
        batch: as in :func:`targets`.

    Returns:
        ``(losses_n, tasks_n, sequences_n)``: the loss (fp32, or fp64 for fp64 logits), task and sequence of
        each of the n targets.

    Raises:
        ConfigError: an unknown task type.
    """
    found = targets(batch, task_type)
    if task_type == "FEATURE_EXTRACTION":
        losses_n = batch_losses(logits, batch, found.rows_n)
        return losses_n, found.tasks_n.to(logits.device), found.sequences_n.to(logits.device)
    rows_nV = logits.reshape(-1, logits.shape[-1]).index_select(0, found.rows_n.to(logits.device))
    labels_n = found.labels_n.to(logits.device)
    if rows_nV.dtype not in (torch.float32, torch.float64):
        rows_nV = rows_nV.float()
    losses_n = functional.cross_entropy(rows_nV, labels_n, reduction="none")
    if label_smoothing > 0:
        log_p_nV = rows_nV.log_softmax(-1)
        masked_nV = rows_nV == -torch.inf
        # Filled before the sum: -inf times a weight of zero would be nan, in the gradient too.
        spread_n = -log_p_nV.masked_fill(masked_nV, 0.0).sum(-1) / (~masked_nV).sum(-1)
        losses_n = (1 - label_smoothing) * losses_n + label_smoothing * spread_n
    return losses_n, found.tasks_n.to(logits.device), found.sequences_n.to(logits.device)


def task_sums(losses_n: Tensor, tasks_n: Tensor, n_tasks: int) -> Tensor:
    """Loss sums S_t, detached: fp64 [T] on the losses' device, the same bits every time."""
    sums_T = torch.zeros(n_tasks, dtype=torch.float64, device=losses_n.device)
    values_n = losses_n.detach().double()
    if losses_n.is_cuda:  # index_put_ sorts there; index_add_ would use atomics, whose order varies
        return sums_T.index_put_((tasks_n,), values_n, accumulate=True)
    return sums_T.index_add_(0, tasks_n, values_n)


def coefficients(
    tasks_n: Tensor, sequences_n: Tensor, counts: Counts, weights_T: Tensor, reduction: str = "token"
) -> Tensor:
    """The factor of each target's loss in the step's loss, fp64 [n].

    - ``token``: w_t / N (every token weighs the same),
    - ``task``: w_t / (N_t * tasks present in the step) (every task weighs the same),
    - ``sample``: w_t / (tokens of the sequence * sequences of the step) (every sequence weighs the same).

    Args:
        tasks_n, sequences_n: int64 [n], from :func:`token_losses`.
        counts: of the whole step, over all ranks and micro-batches.
        weights_T: [T], loss weights w_t.

    Raises:
        ConfigError: an unknown reduction.
    """
    tokens_T = counts.tokens_T.to(tasks_n.device)
    w_n = weights_T.to(tasks_n.device, torch.float64)[tasks_n]
    if reduction == "token":
        return w_n / tokens_T.sum()
    if reduction == "task":
        return w_n / (tokens_T[tasks_n] * (tokens_T > 0).sum())
    if reduction == "sample":
        lengths = torch.bincount(sequences_n)
        return w_n / (lengths[sequences_n] * counts.samples_T.to(tasks_n.device).sum())
    raise ConfigError(f"loss_reduction: {reduction!r} is none of {', '.join(REDUCTIONS)}")


def step_loss(
    logits: Tensor,
    batch: Mapping[str, Any],
    counts: Counts,
    weights_T: Tensor,
    *,
    task_type: str,
    reduction: str = "token",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One micro-batch's share of the step's loss.

    The shares of all micro-batches of all ranks add up to the loss of the step, and so do their gradients:
    accumulate gradients as sums, and where an engine averages over ranks, multiply by the number of ranks.
    A micro-batch without targets gives a zero that is still connected to the graph.

    Args:
        logits: [B, L, V] or [B, V]; batch: as in :func:`targets`.
        counts: of the whole step, over all ranks and micro-batches (:func:`count`, added up).
        weights_T: [T], loss weights w_t.

    Returns:
        ``(loss, sums_T)``: the scalar to back-propagate, and the detached loss sums S_t (fp64 [T], without
        w_t) of this micro-batch, to be added up and divided by ``counts.tokens_T``.

    Raises:
        ConfigError: an unknown task type or reduction.
    """
    losses_n, tasks_n, sequences_n = token_losses(logits, batch, task_type, label_smoothing)
    factors_n = coefficients(tasks_n, sequences_n, counts, weights_T, reduction).to(losses_n.dtype)
    return (losses_n * factors_n).sum(), task_sums(losses_n, tasks_n, weights_T.shape[0])


def task_losses(
    logits: Tensor,
    batch: Mapping[str, Any],
    counts: Counts,
    weights_T: Tensor,
    *,
    task_type: str,
    reduction: str = "token",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`step_loss` with each task's part of it apart: ``(losses_T, sums_T)``, both [T].

    The parts are zeros, still connected to the graph, for tasks without targets here.
    """
    losses_n, tasks_n, sequences_n = token_losses(logits, batch, task_type, label_smoothing)
    factors_n = coefficients(tasks_n, sequences_n, counts, weights_T, reduction).to(losses_n.dtype)
    n_tasks = weights_T.shape[0]
    losses_T = losses_n.new_zeros(n_tasks).index_put((tasks_n,), losses_n * factors_n, accumulate=True)
    return losses_T, task_sums(losses_n, tasks_n, n_tasks)
