"""Tokens of a task, made once: ``datasets`` keeps them in a file named by all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config
from taskmoe.train.data.encode import Columns, Encoder
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.formats import Row

_VERSION = 1  # of what is written below; a change makes old caches unused

_IDS = datasets.List(datasets.Value("int32"))
_INT = datasets.Value("int32")
_FEATURES = {
    "CAUSAL_LM": {"input_ids": _IDS, "labels": _IDS, "length": _INT, "prompt_length": _INT},
    "SEQ_2_SEQ_LM": {"input_ids": _IDS, "labels": _IDS, "length": _INT},
    "SEQ_CLS": {"input_ids": _IDS, "label": _INT, "length": _INT},
    "FEATURE_EXTRACTION": {
        "input_ids": _IDS,
        "labels": _IDS,
        "negatives": datasets.List(_IDS),
        "length": _INT,
    },
}
# Lengths before any cut; loss_tokens is 0 where nothing could be learned from the row.
_CHECKS = {"row": _INT, "full_length": _INT, "target_length": _INT, "loss_tokens": _INT}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text gets.

    Padding and truncation are left out: they are arguments of the last call, not properties of the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = tokenizer.get_vocab()
    parts = [
        type(tokenizer).__name__,
        state,
        tokenizer.special_tokens_map,
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def encode_task(
    rows: list[Row],
    labels: tuple[str, ...] | None,
    tokenizer: Any,
    fingerprint: str,
    config: Config,
    skipped: Counter[str],
) -> tuple[datasets.Dataset, list[Row]]:
    """One task's tokens and the rows they belong to.

    Raises:
        DataError: see :func:`taskmoe.train.data.bundle.tokenise`.
    """
    if config.task_type not in _FEATURES:
        raise ConfigError(f"task_type: {config.task_type!r} is unknown; known are {', '.join(_FEATURES)}")
    features = datasets.Features({**_FEATURES[config.task_type], **_CHECKS})
    columns = _columns(rows, labels, config.task_type)
    if not rows:
        empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        return empty.remove_columns([name for name in _CHECKS if name != "row"]), []
    cut = config.data.on_long_row == "truncate"
    limits = [config.data.max_length, config.data.max_target_length] if cut else []
    settings: list[Any] = [_VERSION, fingerprint, config.task_type, limits, columns]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:40]
    encoder = Encoder(tokenizer, config.task_type, config.data.max_length, config.data.max_target_length, cut,
                      [row["where"] for row in rows])  # fmt: skip
    folder = Path(config.data.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "taskmoe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _no_bars():
            tokens = datasets.Dataset.from_dict(columns).map(
                encoder, with_indices=True, batched=True, remove_columns=list(columns), features=features,
                new_fingerprint=name, cache_file_name=str(folder / f"tokens-{name}.arrow"),
                load_from_cache_file=True,
            )  # fmt: skip
    except OSError as error:
        raise DataError(
            f"data.cache_dir {folder}: cannot be used ({error}); name a folder you can write to"
        ) from error
    return _check(tokens, rows, config, skipped)


def _columns(rows: list[Row], labels: tuple[str, ...] | None, task_type: str) -> Columns:
    if task_type == "SEQ_CLS":
        ids = {label: i for i, label in enumerate(labels or ())}
        return {"prompt": [r["prompt"] for r in rows], "label": [ids[r["label"]] for r in rows]}
    columns: Columns = {"prompt": [r["prompt"] for r in rows], "target": [r["target"] for r in rows]}
    if task_type == "CAUSAL_LM":
        columns["messages"] = [json.dumps(r["messages"]) if r["messages"] else "" for r in rows]
    if task_type == "FEATURE_EXTRACTION":
        columns["negatives"] = [json.dumps(r.get("negatives") or []) for r in rows]
    return columns


def _check(
    tokens: datasets.Dataset, rows: list[Row], config: Config, skipped: Counter[str]
) -> tuple[datasets.Dataset, list[Row]]:
    data = config.data
    checks = {name: tokens.data.column(name).to_pylist() for name in _CHECKS}
    limits = (("full_length", "data.max_length", data.max_length),
              ("target_length", "data.max_target_length", data.max_target_length))  # fmt: skip
    drop: set[int] = set()
    for column, key, limit in limits:
        long = [i for i, n in enumerate(checks[column]) if n > limit]
        if not long:
            continue
        if data.on_long_row == "error":
            raise DataError(
                f"{checks[column][long[0]]} tokens, over {key} {limit}; raise it to {max(checks[column])} "
                "or set data.on_long_row to skip or truncate",
                rows[long[0]]["where"],
            )
        skipped[
            f"cut to {key} {limit}" if data.on_long_row == "truncate" else f"longer than {key} {limit}"
        ] += len(long)
        if data.on_long_row == "skip":
            drop.update(long)
    mute = [i for i, n in enumerate(checks["loss_tokens"]) if n == 0 and i not in drop]
    if mute:
        if data.on_bad_row != "skip":
            raise DataError(
                "gives no tokens to learn from (the tokenizer knows none of the text, or the cut left none); "
                "change the row, the tokenizer or data.max_length",
                rows[mute[0]]["where"],
            )
        skipped["without tokens to learn from"] += len(mute)
        drop.update(mute)
    tokens = tokens.remove_columns([name for name in _CHECKS if name != "row"])
    if not drop:
        return tokens, rows
    keep = [i for i in range(len(rows)) if i not in drop]
    kept = tokens.select(keep).remove_columns("row")
    return kept.add_column("row", list(range(len(keep))), feature=_INT), [rows[i] for i in keep]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Tokenising hundreds of small tasks would print as many bars."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
