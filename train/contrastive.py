"""The contrastive objective of encoders: each query must find its own text among others.

Legend: Q queries, C candidates (texts to find, hard negatives among them), D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from taskmoe.moe.config import ConfigError
from taskmoe.train.data.pairs import QUERY, TEXT
from taskmoe.train.distributed import gather_objects, world_size

SIMILARITIES = ("dot", "cosine")


def info_nce(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    positives_Q: Tensor,
    tasks_Q: Tensor,
    tasks_C: Tensor,
    *,
    keys_C: Tensor | None = None,
    temperature: float = 1.0,
    similarity: str = "dot",
    across_tasks: bool = False,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with the negatives of the batch:

        loss_q = -log( exp(s(q, c+) / temperature) / sum_c exp(s(q, c) / temperature) )

    The sum is over the query's own text c+ and the other candidates of its task: other queries' texts, and
    hard negatives of any query (as in DPR, Karpukhin et al. 2020, and SciMult, Zhang et al. 2023). Candidates
    of other tasks are left out unless ``across_tasks``: so the gradient of a task depends on its own rows
    alone. A query without any negative has a loss of zero.

    Args:
        queries_QD, candidates_CD: floating point; bf16 and fp16 are computed in fp32.
        positives_Q: int64, the candidate that each query must find.
        tasks_Q, tasks_C: int64, the task of each.
        keys_C: int64, equal for equal texts: a text equal to the query's own is no negative of it.
        similarity: ``dot``, or ``cosine``: of vectors of length one.

    Returns:
        [Q], fp32 (fp64 for fp64).

    Raises:
        ConfigError: an unknown similarity, or a temperature that is not above 0.
    """
    scores_QC = similarities(queries_QD, candidates_CD, similarity) / _checked(temperature)
    allowed_QC = _allowed(positives_Q, tasks_Q, tasks_C, keys_C, across_tasks)
    scores_QC = scores_QC.masked_fill(~allowed_QC, -torch.inf)
    own_Q = scores_QC.gather(1, positives_Q.unsqueeze(1)).squeeze(1)
    return scores_QC.logsumexp(1) - own_Q


def batch_losses(vectors_ND: Tensor, batch: Mapping[str, Any], queries_Q: Tensor) -> Tensor:
    """:func:`info_nce` of the queries of a batch, among its texts, by the inner product: [Q].

    The negatives are those that the batch of this rank holds, so the loss depends on how many rows a rank
    takes at a time (``per_device_train_batch_size``).

    Args:
        vectors_ND: of every text of the batch; batch: ``roles``, ``pairs``, ``keys``, ``task_ids``, [N] each
            (:func:`taskmoe.train.data.pairs.texts_of`).
        queries_Q: int64, which texts are the queries.
    """
    device = vectors_ND.device
    queries_QD = vectors_ND.index_select(0, queries_Q.to(device))
    if not len(queries_Q):
        return queries_QD.sum(1)  # empty, and still part of the graph
    columns = {name: batch[name].to(device) for name in ("roles", "pairs", "keys", "task_ids")}
    texts_C = (columns["roles"] != QUERY).nonzero().squeeze(1)
    queries_Q = queries_Q.to(device)
    right_QC = columns["pairs"][queries_Q].unsqueeze(1) == columns["pairs"][texts_C]
    right_QC = right_QC & (columns["roles"][texts_C] == TEXT)
    return info_nce(
        queries_QD,
        vectors_ND.index_select(0, texts_C),
        right_QC.int().argmax(1),
        columns["task_ids"][queries_Q],
        columns["task_ids"][texts_C],
        keys_C=columns["keys"][texts_C],
    )


def positive_ranks(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    positives_Q: Tensor,
    tasks_Q: Tensor,
    tasks_C: Tensor,
    *,
    keys_C: Tensor | None = None,
    similarity: str = "dot",
    across_tasks: bool = False,
) -> Tensor:
    """At which place, from 1, each query finds its own text among the candidates of :func:`info_nce`: [Q].

    Another candidate with the same score stands before it: an encoder that tells nothing apart is last.
    """
    scores_QC = similarities(queries_QD, candidates_CD, similarity)
    allowed_QC = _allowed(positives_Q, tasks_Q, tasks_C, keys_C, across_tasks)
    own_Q1 = scores_QC.gather(1, positives_Q.unsqueeze(1))
    return (allowed_QC & (scores_QC >= own_Q1)).sum(1)


def similarities(queries_QD: Tensor, candidates_CD: Tensor, similarity: str) -> Tensor:
    """s(q, c), [Q, C]: the inner product, or that of vectors of length one.

    Raises:
        ConfigError: an unknown similarity.
    """
    if similarity not in SIMILARITIES:
        raise ConfigError(
            f"contrastive.similarity: {similarity!r} is unknown; known are {', '.join(SIMILARITIES)}"
        )
    if queries_QD.dtype not in (torch.float32, torch.float64):
        queries_QD, candidates_CD = queries_QD.float(), candidates_CD.float()
    if similarity == "cosine":
        queries_QD, candidates_CD = (functional.normalize(x, dim=-1) for x in (queries_QD, candidates_CD))
    return queries_QD @ candidates_CD.T


def _allowed(
    positives_Q: Tensor, tasks_Q: Tensor, tasks_C: Tensor, keys_C: Tensor | None, across_tasks: bool
) -> Tensor:
    """[Q, C]: the query's own text, and what counts as a negative of it."""
    own_QC = functional.one_hot(positives_Q, len(tasks_C)).bool()
    allowed_QC = torch.ones_like(own_QC) if across_tasks else tasks_Q.unsqueeze(1) == tasks_C
    if keys_C is not None:
        allowed_QC = allowed_QC & (keys_C[positives_Q].unsqueeze(1) != keys_C)
    return allowed_QC | own_QC


def _checked(temperature: float) -> float:
    if not temperature > 0:
        raise ConfigError(f"contrastive.temperature: {temperature} must be above 0")
    return temperature


def gather_rows(x_CD: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, rank after rank, and where this rank's begin.

    With a gradient: each rank gets, for its own rows, the sum of what all ranks' losses ask of them, so that
    the gradients of all ranks add up to that of the sum of their losses. All ranks must call it together,
    forward and backward. Ranks may have different numbers of rows. Whole numbers have no gradient.
    """
    if world_size() == 1:
        return x_CD, 0
    sizes = gather_objects(len(x_CD))
    start = sum(sizes[: dist.get_rank()])
    return _GatherRows.apply(x_CD, sizes, start), start


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_CD: Tensor, sizes: list[int], start: int) -> Tensor:
        ctx.start, ctx.size = start, len(x_CD)
        # Every rank's rows stand in a tensor of zeros at their own place, and the sum puts them together.
        whole = x_CD.new_zeros(sum(sizes), *x_CD.shape[1:])
        whole[start : start + len(x_CD)] = x_CD
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None, None
