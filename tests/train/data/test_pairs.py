"""Queries and texts from a file to a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from taskmoe.train.data.bundle import read_tasks, tokenise
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.errors import DataError
from taskmoe.train.data.pairs import key_of, texts_of

TOKENIZER = SimpleNamespace(pad_token_id=9, eos_token_id=1)
ROWS = [
    {"task": 2, "input_ids": [5, 6], "labels": [7], "negatives": [[8, 8, 8], [4]]},
    {"task": 0, "input_ids": [3], "labels": [4], "negatives": []},
]


def test_a_batch_holds_every_text_once_sorted_by_task():
    batch = Collator(TOKENIZER, "FEATURE_EXTRACTION", 3)(ROWS)
    assert batch["order"] == [1, 0]
    assert batch["input_ids"].tolist() == [[3, 9, 9], [4, 9, 9], [5, 6, 9], [7, 9, 9], [8, 8, 8], [4, 9, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [1, 1, 2, 1, 3, 1]
    assert batch["task_ids"].tolist() == [0, 0, 2, 2, 2, 2]
    assert batch["labels"].tolist() == [0, -100, 1, -100, -100, -100]
    assert batch["pairs"].tolist() == [0, 0, 1, 1, 1, 1]
    assert batch["roles"].tolist() == [0, 1, 0, 1, 2, 2]
    keys = batch["keys"].tolist()
    assert keys[1] == keys[5]
    assert len(set(keys)) == 5
    assert all(t.dtype == torch.int64 for t in batch.values() if isinstance(t, torch.Tensor))


def test_keys_are_the_same_in_every_process():
    assert key_of([4, 5]) == key_of((4, 5)) == 5380592773796547388
    assert 0 <= key_of([4, 5]) < 2**63
    assert key_of([4, 5]) != key_of([5, 4])


def test_rows_without_negatives_need_no_column():
    ids, columns = texts_of([{"task": 0, "input_ids": [1], "labels": [2]}])
    assert ids == [[1], [2]]
    assert columns["roles"].tolist() == [0, 1]


def test_from_a_file_to_token_rows(write, configure, char_tokenizer):
    rows = [
        {"query": "abc", "positive": "de", "negatives": ["fghi", "j"]},
        {"query": "k", "positive": "lmnop"},
    ]
    config = configure(write("a.jsonl", rows), task_type="FEATURE_EXTRACTION")
    bundle = tokenise(read_tasks(config, ("train",), say=print), char_tokenizer, config, say=print)
    found = bundle.splits["train"][0].tokens
    texts = [["abc", "de", "fghi", "j"], ["k", "lmnop"]]
    for row, expected in zip(found, texts, strict=True):
        ids = [row["input_ids"], row["labels"], *row["negatives"]]
        assert [char_tokenizer.decode(i) for i in ids] == expected
        assert row["length"] == max(map(len, expected))


@pytest.mark.parametrize("long", ["positive", "negatives"])
def test_a_text_that_is_too_long_names_its_line(long, write, configure, char_tokenizer):
    row = {"query": "a", "positive": "b", "negatives": ["c"]}
    row[long] = ["x" * 9] if long == "negatives" else "x" * 9
    settings = {"task_type": "FEATURE_EXTRACTION"}
    path = write("a.jsonl", [{"query": "a", "positive": "b"}, row])
    for rule in ("error", "skip", "truncate"):
        config = configure(path, max_target_length=5, on_long_row=rule, **settings)
        if rule == "error":
            with pytest.raises(DataError, match=r"a\.jsonl:2: .*9 tokens, over data\.max_target_length 5"):
                tokenise(read_tasks(config, ("train",), say=print), char_tokenizer, config, say=print)
            continue
        bundle = tokenise(read_tasks(config, ("train",), say=print), char_tokenizer, config, say=print)
        found = bundle.splits["train"][0].tokens
        assert len(found) == (1 if rule == "skip" else 2)
        assert max(found["length"]) <= 5
