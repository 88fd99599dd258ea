from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config
from taskmoe.train.data.cache import encode_task, tokenizer_fingerprint
from taskmoe.train.data.errors import DataError

Configure = Callable[..., Config]


def rows(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"prompt": p, "target": t, "accepted": [t], "messages": None, "label": t, "where": f"f:{i}"}
        for i, (p, t) in enumerate(pairs, 1)
    ]


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def encode(
    data: list[dict[str, Any]], tokenizer: Any, config: Config, skipped: Counter[str] | None = None
) -> Any:
    skipped = Counter() if skipped is None else skipped
    return encode_task(data, ("t", "u"), tokenizer, tokenizer_fingerprint(tokenizer), config, skipped)


def test_the_second_call_reads_the_file_of_the_first(
    char_tokenizer: Any, configure: Configure, tmp_path: Path
) -> None:
    tokenizer, config = Counting(char_tokenizer), configure()
    data = rows(("ab", "t"), ("c", "u"))
    first, _ = encode(data, tokenizer, config)
    (file,) = (tmp_path / "cache").glob("tokens-*.arrow")
    calls, stamp = tokenizer.calls, file.stat().st_mtime_ns
    assert calls > 0
    second, _ = encode(data, tokenizer, config)
    assert (tokenizer.calls, file.stat().st_mtime_ns) == (calls, stamp)
    assert second[:] == first[:]
    # Where a row stands does not change its tokens.
    encode([{**row, "where": "g:9"} for row in data], tokenizer, config)
    assert tokenizer.calls == calls


def test_whatever_changes_the_tokens_misses_the_cache(
    char_tokenizer: Any, configure: Configure, tmp_path: Path
) -> None:
    data = rows(("ab", "t"))

    def files() -> int:
        return len(list((tmp_path / "cache").glob("*.arrow")))

    encode(data, char_tokenizer, configure())
    assert files() == 1
    encode(rows(("ac", "t")), char_tokenizer, configure())
    encode(data, char_tokenizer, configure(task_type="SEQ_2_SEQ_LM"))
    encode(data, char_tokenizer, configure(on_long_row="truncate"))
    encode(data, char_tokenizer, configure(on_long_row="truncate", max_length=9))
    assert files() == 5
    encode(data, char_tokenizer, configure(max_length=9))  # a limit alone changes nothing
    assert files() == 5
    char_tokenizer.add_tokens(["ab"])
    assert encode(data, char_tokenizer, configure())[0]["prompt_length"][0] == 1
    assert files() == 6


def test_the_fingerprint_forgets_the_last_call(char_tokenizer: Any) -> None:
    before = tokenizer_fingerprint(char_tokenizer)
    char_tokenizer(["abc", "d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(char_tokenizer) == before
    char_tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(char_tokenizer) != before


@pytest.mark.parametrize(
    ("task_type", "pair", "words"),
    [
        ("CAUSAL_LM", ("abcdef", "t"), "f:2: 8 tokens, over data.max_length 5; raise it to 8 or set"),
        ("SEQ_CLS", ("abcdef", "t"), "f:2: 6 tokens, over data.max_length 5; raise it to 6 or set"),
        ("SEQ_2_SEQ_LM", ("ab", "tuv"), "f:2: 4 tokens, over data.max_target_length 3; raise it to 4 or set"),
    ],
)
def test_long_rows_stop_are_left_out_or_cut(
    char_tokenizer: Any, configure: Configure, task_type: str, pair: tuple[str, str], words: str
) -> None:
    data = rows(("a", "t"), pair, ("b", "u"))
    for row in data:
        row["label"] = "t"
    limits = {"task_type": task_type, "max_length": 5, "max_target_length": 3}
    with pytest.raises(DataError) as error:
        encode(data, char_tokenizer, configure(**limits))
    assert str(error.value).startswith(words)
    key = words.split("over ")[1].split(";")[0]

    skipped: Counter[str] = Counter()
    tokens, kept = encode(data, char_tokenizer, configure(**limits, on_long_row="skip"), skipped)
    assert skipped == {f"longer than {key}": 1}
    assert [row["where"] for row in kept] == ["f:1", "f:3"]
    assert list(tokens["row"]) == [0, 1]
    assert tokens[1]["input_ids"][0] == char_tokenizer.convert_tokens_to_ids("b")

    skipped = Counter()
    tokens, kept = encode(data, char_tokenizer, configure(**limits, on_long_row="truncate"), skipped)
    assert skipped == {f"cut to {key}": 1}
    assert len(tokens) == len(kept) == 3
    assert max(tokens["length"]) <= 5


def test_rows_without_tokens(char_tokenizer: Any, configure: Configure) -> None:
    data = rows(("a", "t"), ("b", "u"))
    data[1]["prompt"] = ""
    with pytest.raises(DataError, match="f:2: gives no tokens to learn from"):
        encode(data, char_tokenizer, configure())
    skipped: Counter[str] = Counter()
    tokens, kept = encode(data, char_tokenizer, configure(on_bad_row="skip"), skipped)
    assert (len(tokens), [row["where"] for row in kept]) == (1, ["f:1"])
    assert skipped == {"without tokens to learn from": 1}


def test_no_rows_have_the_columns_of_rows(char_tokenizer: Any, configure: Configure) -> None:
    tokens, kept = encode([], char_tokenizer, configure())
    assert (len(tokens), kept) == (0, [])
    assert tokens.column_names == encode(rows(("a", "t")), char_tokenizer, configure())[0].column_names


@pytest.mark.parametrize("bars", [True, False])
def test_bars_are_as_they_were(
    char_tokenizer: Any, configure: Configure, bars: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
        encode(rows(("a", "t")), char_tokenizer, configure())
        assert datasets.are_progress_bars_disabled() is not bars
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
    assert capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_written(char_tokenizer: Any, configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir .*file: cannot be used"):
        encode(rows(("a", "t")), char_tokenizer, configure(cache_dir=str(tmp_path / "file")))


def test_an_unknown_task_type(char_tokenizer: Any, configure: Configure) -> None:
    with pytest.raises(ConfigError, match="task_type: 'TOKEN_CLS' is unknown"):
        encode([], char_tokenizer, configure(task_type="TOKEN_CLS"))
