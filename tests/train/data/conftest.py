"""Files to read, a tokenizer to read them with, and a configuration whose cache is thrown away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taskmoe.train.config import Config, DataConfig, DatasetConfig


@pytest.fixture
def char_tokenizer() -> PreTrainedTokenizerFast:
    """One id a character, so that every length in these tests can be counted by eye."""
    special = ["<pad>", "</s>", "<s>"]
    vocabulary = {t: i for i, t in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(name, rows)``: a file of JSON lines (list of objects), or of the text or bytes given."""

    def write(name: str, content: list[Any] | str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """``configure(path or DatasetConfig, ..., task_type=..., **data settings)``."""

    def configure(*entries: Any, task_type: str = "CAUSAL_LM", **data: Any) -> Config:
        data = {"cache_dir": str(tmp_path / "cache"), **data}
        datasets = tuple(e if isinstance(e, DatasetConfig) else DatasetConfig(path=str(e)) for e in entries)
        return Config(task_type=task_type, datasets=datasets, data=DataConfig(**data))

    return configure
