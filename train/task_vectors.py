"""Vectors of tasks from their training rows, made as a run starts: of texts here, of gradients in fisher.py.

Legend: D task vector, L positions, B texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.config import ConfigError
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.files import FILE, read_vectors, write_vectors
from taskmoe.moe.representations.fisher import FisherVectors
from taskmoe.moe.representations.frozen import TextVectors
from taskmoe.moe.representations.kinds import with_vectors
from taskmoe.moe.state import with_saved_vectors
from taskmoe.train.config import Config
from taskmoe.train.distributed import Ranks
from taskmoe.train.fisher import fisher_of_rows
from taskmoe.train.models import LOAD_ERRORS, build_model
from taskmoe.train.together import main_first

if TYPE_CHECKING:
    from taskmoe.train.setup import Data


def text_vectors(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    max_length: int = 256,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """{task: [D] float32}: :func:`text_states`, averaged over a task's texts (TextEmb of Vu et al. 2020; Ye,
    Zha, Ren 2022).

    Raises:
        ValueError: a task without a text, or a text without a token.
    """
    states = text_states(encoder, tokenizer, texts, max_length=max_length, batch_size=batch_size)
    return {task: states_nD.mean(0) for task, states_nD in states.items()}


@torch.no_grad()
def text_states(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    max_length: int = 256,
    batch_size: int = 32,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """{task: [n, D] float32}: of each text the last hidden states, averaged over its tokens.

    Padding counts for nothing (the code of Ye, Zha, Ren 2022 averages over it, too).

    Args:
        encoder: a Hugging Face model; of an encoder-decoder the encoder is used, of a language model what is
            below its head.
        texts: {task: its n texts}; longer ones than ``max_length`` tokens are cut.
        advance: called after each task.

    Raises:
        ValueError: a task without a text, or a text without a token.
    """
    whole = bool(getattr(getattr(encoder, "config", None), "is_encoder_decoder", False))
    body: Any = encoder.get_encoder() if whole else getattr(encoder, "base_model", encoder)  # type: ignore[operator]
    training, device = body.training, next(body.parameters()).device
    body.eval()
    found = {}
    for task, given in texts.items():
        if not given:
            raise ValueError(f"task {task!r} has no text")
        parts = []
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
            parts.append(torch.einsum("bl,bld->bd", weights_BL, states_BLD).cpu())
        found[task] = torch.cat(parts)
        advance()
    body.train(training)
    return found


def with_task_vectors(config: Config, data: Data, ranks: Ranks, known: Path | None) -> Config:
    """``config``, with a file of vectors in the run's folder where a representation of ``MAKERS`` names none,
    and with a checkpoint's own where the file that it names is gone.

    Only training rows are read, before anything trains, on rank 0. A collective.

    Args:
        known: a checkpoint that the run goes on from: its tasks keep their vectors.

    Raises:
        ConfigError: an encoder that cannot be loaded; parameters that are not there.
    """
    moe, given = config.moe, config.moe.representation_options or {}
    kind = choices_in_use(moe).get("representation")
    if kind not in MAKERS or given.get("path") is not None:
        return config if known is None else replace(config, moe=with_saved_vectors(moe, known))
    options = options_of("representation", moe, kind)
    path = Path(config.output_dir) / FILE

    def make() -> None:
        if not ranks.is_main:
            return
        found = {} if known is None or not (known / FILE).exists() else read_vectors(known / FILE)
        missing = [name for name in data.bundle.tasks.names if name not in found]
        if missing:
            found = {**found, **MAKERS[kind](config, data, ranks, options, missing)}
        write_vectors(found, path)

    main_first(ranks, make)
    return replace(config, moe=with_vectors(moe, str(path)))


def text_of_rows(
    config: Config, data: Data, ranks: Ranks, options: TextVectors.Options, tasks: Sequence[str]
) -> dict[str, Tensor]:
    """{task: [D] float32}: :func:`text_vectors` of the first training rows of each of ``tasks``.

    Raises:
        ConfigError: an encoder that cannot be loaded.
    """
    texts = texts_of_rows(data, tasks, options.rows, options.targets)
    encoder, tokenizer = _encoder(options.model, config, data)
    return text_vectors(encoder.to(ranks.device), tokenizer, texts, max_length=config.data.max_length)


def texts_of_rows(data: Data, tasks: Sequence[str], rows: int, targets: bool) -> dict[str, list[str]]:
    """{task: the prompts of its first training rows}, with the answers behind them where ``targets``."""
    splits, table = data.bundle.splits["train"], data.bundle.tasks
    return {
        name: [
            f"{row['prompt']} {row['target']}" if targets else row["prompt"]
            for row in splits[table.id(name)].raw[:rows]
        ]
        for name in tasks
    }


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


# (config, data, ranks, options of the representation, names of tasks) -> {task: [D] float32}, on rank 0.
MAKERS: dict[Any, Callable[..., dict[str, Tensor]]] = {
    TextVectors: text_of_rows,
    FisherVectors: fisher_of_rows,
}
