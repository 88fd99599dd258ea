"""Vectors of tasks from gradients: the diagonal of the Fisher information of a model, a vector a task.

``representation: fisher`` makes them at the start of a run, of the base model. For those of an adapter call
:func:`fisher_vectors`, and name the file that ``write_vectors`` writes as ``representation_options.path``.
:func:`gradient_vectors` are the gradients themselves, which ``taskmoe select`` compares.

Legend: D task vector, P parameters, T tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.representations.fisher import FisherVectors
from taskmoe.train.config import Config
from taskmoe.train.data.collator import Collator
from taskmoe.train.distributed import Ranks
from taskmoe.train.objectives import model_inputs, token_losses
from taskmoe.train.setup import build_moe

if TYPE_CHECKING:
    from taskmoe.train.setup import Data

CHUNK = 1 << 22  # entries of a sketch whose cells are drawn at once


def fisher_vectors(
    parameters: Sequence[nn.Parameter],
    batches: Mapping[str, Iterable[Any]],
    loss: Callable[[Any], Tensor],
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """{task: vector}: the squared gradient of each parameter, averaged over a task's batches (Achille et al.
    2019; Vu et al. 2020; Ye, Zha, Ren 2022): the diagonal of the empirical Fisher information where a batch
    is one row and the loss its negative log-likelihood.

    Args:
        parameters: of an adapter that was fitted to the task, or of a model that all tasks share.
        batches: {task: batches of its training rows}.
        loss: batch -> the loss, a scalar that depends on the parameters.
        reduce: [P] float32 -> what is kept of it, task by task, such as :func:`sketch`; None: all of it.
            See :func:`pca` for components over the tasks.

    Raises:
        ValueError: a task without a batch.
    """
    return _means(parameters, batches, loss, reduce, torch.square)


def gradient_vectors(
    parameters: Sequence[nn.Parameter],
    batches: Mapping[str, Iterable[Any]],
    loss: Callable[[Any], Tensor],
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """{task: vector}: the gradient of each parameter, averaged over a task's batches; arguments and errors as
    of :func:`fisher_vectors`."""
    return _means(parameters, batches, loss, reduce, lambda gradient: gradient)


def _means(
    parameters: Sequence[nn.Parameter],
    batches: Mapping[str, Iterable[Any]],
    loss: Callable[[Any], Tensor],
    reduce: Callable[[Tensor], Tensor] | None,
    of_gradient: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    vectors = {}
    for task, of_task in batches.items():
        totals, count = [torch.zeros_like(p, dtype=torch.float32) for p in parameters], 0
        for batch in of_task:
            found = torch.autograd.grad(loss(batch), list(parameters), allow_unused=True)
            for total, g in zip(totals, found, strict=True):
                if g is not None:
                    total.add_(of_gradient(g.detach().float()))
            count += 1
        if not count:
            raise ValueError(f"task {task!r} has no batch")
        vector_P = torch.cat([(total / count).flatten().cpu() for total in totals])
        vectors[task] = vector_P if reduce is None else reduce(vector_P)
    return vectors


def sketch(vector_P: Tensor, dim: int, seed: int) -> Tensor:
    """[dim] float32 of length one: each entry is added to one of ``dim`` cells, with a sign, both drawn by
    ``seed``.

    With one seed the cosine of two vectors is kept in expectation, with a spread of about 1 / sqrt(dim)
    (Charikar et al. 2002; Weinberger et al. 2009, arXiv 0902.2206). Zeros stay zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    cells_D = torch.zeros(dim, dtype=torch.float64)
    for part in vector_P.double().split(CHUNK):
        cells = torch.randint(dim, part.shape, generator=generator)
        signs = torch.randint(2, part.shape, generator=generator) * 2 - 1
        cells_D.index_add_(0, cells, part * signs)
    return (cells_D / cells_D.norm().clamp_min(torch.finfo(torch.float64).tiny)).float()


def pca(vectors: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
    """{task: [dim]}: the first ``dim`` principal components of the tasks' vectors.

    Raises:
        ValueError: more components than there are tasks or numbers.
    """
    x_TD = torch.stack(list(vectors.values())).double()
    if not 1 <= dim <= min(x_TD.shape):
        raise ValueError(f"dim: {dim} components of {x_TD.shape[0]} tasks with {x_TD.shape[1]} numbers each")
    _, _, axes_DD = torch.linalg.svd(x_TD - x_TD.mean(0), full_matrices=False)
    axes_DD = axes_DD[:dim]
    # An axis has two directions: the one in which its largest entry is positive, on every machine.
    largest = axes_DD.gather(1, axes_DD.abs().argmax(1, keepdim=True))
    found_TD = (x_TD - x_TD.mean(0)) @ (axes_DD * largest.sign()).T
    return dict(zip(vectors, found_TD.float().unbind(0), strict=True))


def fisher_of_rows(
    config: Config,
    data: Data,
    ranks: Ranks,
    options: FisherVectors.Options,
    tasks: Sequence[str],
    *,
    make: Callable[..., dict[str, Tensor]] = fisher_vectors,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """{task: [D] float32}: :func:`sketch` of the Fisher diagonal of the base model that ``config`` builds,
    over the first training rows of each of ``tasks``, one at a time, without dropout.

    Heads of tasks start alike and are no part of it: what differs between the tasks is the gradient that
    reaches the base.

    Args:
        make: :func:`gradient_vectors` for gradients in place of the Fisher diagonal.
        advance: called after each task.

    Raises:
        ConfigError: no parameter of the base has a name that fits, or the task type has no loss of one row.
    """
    if config.task_type == "FEATURE_EXTRACTION":
        raise ConfigError(
            "moe.representation: 'fisher' takes the gradient of single rows, but task_type: "
            "FEATURE_EXTRACTION compares rows of a batch; use text"
        )
    # The base as this run builds it; the adapter that stands beside it is switched off.
    plain = TaskMoEConfig(r=1, num_experts=1, router="none", gate="uniform")
    config = replace(config, moe=plain, gradient_checkpointing=False)
    table = data.bundle.tasks
    model = build_moe(config, data.tokenizer, table, ranks).eval()
    model.requires_grad_(False)
    chosen = _chosen(model.parameter_groups()["base"], options.parameters)
    collate = Collator(data.tokenizer, config.task_type, len(table))

    def rows(name: str) -> Iterable[Any]:
        tokens = data.bundle.splits["train"][table.id(name)].tokens
        for i in range(min(len(tokens), options.rows)):
            yield collate([{**tokens[i], "task": table.id(name)}])
        advance()

    def loss(batch: dict[str, Any]) -> Tensor:
        inputs = model_inputs(batch, config.task_type, model.config, ranks.device)
        inputs.pop("instance_embeddings", None)  # of the router that reads the vectors, not of the base
        return token_losses(model(**inputs).logits, batch, config.task_type)[0].sum()

    with model.disable_adapter():
        return make(
            chosen,
            {name: rows(name) for name in tasks},
            loss,
            lambda vector_P: sketch(vector_P, options.dim, config.seed),
        )


def _chosen(base: Sequence[tuple[str, nn.Parameter]], pattern: str) -> list[nn.Parameter]:
    """The base's parameters whose name, as the base has it, fits all of a pattern; they get gradients now."""
    named = {n.removeprefix("base_model.").replace(".base.", "."): p for n, p in base}
    found = [p for n, p in named.items() if p.is_floating_point() and re.fullmatch(pattern, n)]
    if not found:
        raise ConfigError(
            f"moe.representation_options.parameters: {pattern!r} fits no parameter of the base, such as "
            f"{next(iter(named))}"
        )
    for p in found:
        p.requires_grad_(True)
    return found
