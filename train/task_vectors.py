"""Vectors of tasks from what the tasks are made of: their texts, or the gradients of an adapter.

``representation: text`` makes the first kind at the start of a run. For the second kind call the functions
here, and name the file that ``write_vectors`` writes as ``representation_options.path``.

Legend: D task vector, P parameters, T tasks, L positions, B texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.config import ConfigError
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.files import FILE, read_vectors, write_vectors
from taskmoe.moe.representations.frozen import TextVectors
from taskmoe.moe.state import with_saved_vectors
from taskmoe.train.config import Config
from taskmoe.train.distributed import Ranks
from taskmoe.train.models import LOAD_ERRORS, build_model
from taskmoe.train.together import main_first

if TYPE_CHECKING:
    from taskmoe.train.setup import Data


@torch.no_grad()
def text_vectors(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    max_length: int = 256,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """{task: [D] float32}: the last hidden states, averaged over the tokens of a text, then over the texts.

    Padding counts for nothing (TextEmb of Ye, Zha, Ren 2022, whose code averages over it, too).

    Args:
        encoder: a Hugging Face model; of an encoder-decoder the encoder is used, of a language model what is
            below its head.
        texts: {task: its texts}; longer ones than ``max_length`` tokens are cut.

    Raises:
        ValueError: a task without a text, or a text without a token.
    """
    whole = bool(getattr(getattr(encoder, "config", None), "is_encoder_decoder", False))
    body: Any = encoder.get_encoder() if whole else getattr(encoder, "base_model", encoder)  # type: ignore[operator]
    training, device = body.training, next(body.parameters()).device
    body.eval()
    vectors = {}
    for task, given in texts.items():
        if not given:
            raise ValueError(f"task {task!r} has no text")
        total_D: Any = 0.0
        for i in range(0, len(given), batch_size):
            inputs = tokenizer(
                list(given[i : i + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            ids, mask_BL = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
            if not bool(mask_BL.any(-1).all()):
                raise ValueError(f"task {task!r} has a text without a token")
            states_BLD = body(input_ids=ids, attention_mask=mask_BL).last_hidden_state.float()
            weights_BL = mask_BL / mask_BL.sum(-1, keepdim=True)
            total_D = total_D + torch.einsum("bl,bld->d", weights_BL, states_BLD)
        vectors[task] = (total_D / len(given)).cpu()
    body.train(training)
    return vectors


def fisher_vectors(
    parameters: Sequence[nn.Parameter],
    batches: Mapping[str, Iterable[Any]],
    loss: Callable[[Any], Tensor],
    dim: int | None = None,
) -> dict[str, Tensor]:
    """{task: vector}: the squared gradient of each parameter, averaged over a task's batches (Achille et al.
    2019; Ye, Zha, Ren 2022): the diagonal of the Fisher information where a batch is one row.

    Args:
        parameters: of an adapter that was fitted to the task, or of one that all tasks share.
        batches: {task: batches of its training rows}.
        loss: batch -> the loss, a scalar that depends on the parameters.
        dim: None: [P] as it is; else the first ``dim`` principal components over the tasks (:func:`pca`).

    Raises:
        ValueError: a task without a batch.
    """
    vectors = {}
    for task, of_task in batches.items():
        total, count = torch.zeros(sum(p.numel() for p in parameters)), 0
        for batch in of_task:
            found = torch.autograd.grad(loss(batch), list(parameters), allow_unused=True)
            flat = [
                torch.zeros(p.numel()) if g is None else g.detach().float().flatten().cpu()
                for p, g in zip(parameters, found, strict=True)
            ]
            total += torch.cat(flat).square()
            count += 1
        if not count:
            raise ValueError(f"task {task!r} has no batch")
        vectors[task] = total / count
    return vectors if dim is None else pca(vectors, dim)


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


def with_task_vectors(config: Config, data: Data, ranks: Ranks, known: Path | None) -> Config:
    """``config``, with a file of vectors in the run's folder where ``representation: text`` names none, and
    with a checkpoint's own where the file that it names is gone.

    Only training rows are read, before anything trains. A collective.

    Args:
        known: a checkpoint that the run goes on from: its tasks keep their vectors.

    Raises:
        ConfigError: an encoder that cannot be loaded.
    """
    moe, given = config.moe, config.moe.representation_options or {}
    if choices_in_use(moe).get("representation") is not TextVectors or given.get("path") is not None:
        return config if known is None else replace(config, moe=with_saved_vectors(moe, known))
    options = options_of("representation", moe, TextVectors)
    path = Path(config.output_dir) / FILE

    def make() -> None:
        if not ranks.is_main:
            return
        found = {} if known is None or not (known / FILE).exists() else read_vectors(known / FILE)
        texts = {
            data.bundle.tasks[split.task].name: [
                f"{row['prompt']} {row['target']}" if options.targets else row["prompt"]
                for row in split.raw[: options.rows]
            ]
            for split in data.bundle.splits["train"]
        }
        missing = {task: rows for task, rows in texts.items() if task not in found}
        if missing:
            encoder, tokenizer = _encoder(options.model, config, data)
            made = text_vectors(
                encoder.to(ranks.device), tokenizer, missing, max_length=config.data.max_length
            )
            found = {**found, **made}
        write_vectors(found, path)

    main_first(ranks, make)
    return replace(config, moe=replace(moe, representation_options={**given, "path": str(path)}))


def _encoder(name: str, config: Config, data: Data) -> tuple[Any, Any]:
    if name == "base":
        return build_model(config, data.tokenizer, data.bundle.tasks), data.tokenizer
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModel.from_pretrained(name), tokenizer
    except LOAD_ERRORS as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"moe.representation_options.model: no encoder in {name!r}: {first}") from error
