"""Votes of instances, against loops; an index that grows, and comes back from its file."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import ConfigError
from taskmoe.train.retrieval import InstanceIndex

TEXTS = {
    "capitals": [f"capital of country {c}" for c in "abcdefghi"],
    "sums": [f"add {c} and two" for c in "vwxyz"],
    "jokes": ["tell a joke", "say something funny"],
}


def embed(texts):
    """A vector of unit length for each text: what its letters are."""
    counts = torch.stack([torch.tensor([float(t.count(chr(c))) for c in range(97, 123)]) for t in texts])
    return torch.nn.functional.normalize(counts, dim=1)


def test_votes_are_those_of_the_nearest_instances():
    index = InstanceIndex.build(TEXTS, embed)
    queries = embed(["capital of my country", "add w and six", "and add two", "tell a funny joke"])
    expected = [0, 0, 0]
    for q in queries:
        best, winner = -1.0, None
        for t, own in enumerate(TEXTS.values()):
            for text in own:
                similarity = float(q @ embed([text])[0])
                if similarity > best:
                    best, winner = similarity, t
        expected[winner] += 1
    assert index.votes(queries).tolist() == expected == [1, 2, 1]
    assert index.retrieve(queries) == ["sums"]
    assert index.retrieve(queries, 3)[0] == "sums"


def test_ties_go_to_the_more_similar_task():
    index = InstanceIndex(["far", "near"], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    queries = torch.tensor([[0.9, 0.8], [0.1, 0.9]])
    assert index.votes(queries).tolist() == [1, 1]
    assert index.retrieve(queries, 2) == ["near", "far"]


def test_so_many_instances_a_task_and_the_same_ones_again():
    index = InstanceIndex.build(TEXTS, embed, per_task=4, seed=1)
    assert torch.bincount(index.task_n).tolist() == [4, 4, 2]
    again = InstanceIndex.build(TEXTS, embed, per_task=4, seed=1)
    assert torch.equal(index.embeddings_nD, again.embeddings_nD)
    other = InstanceIndex.build(TEXTS, embed, per_task=4, seed=2)
    assert not torch.equal(index.embeddings_nD, other.embeddings_nD)


def test_the_library_grows(tmp_path):
    index = InstanceIndex.build({n: TEXTS[n] for n in ("capitals", "sums")}, embed)
    more = index.add(InstanceIndex.build({"jokes": TEXTS["jokes"]}, embed))
    assert more.tasks == list(TEXTS)
    whole = InstanceIndex.build(TEXTS, embed)
    assert torch.equal(more.task_n, whole.task_n) and torch.equal(more.embeddings_nD, whole.embeddings_nD)
    assert more.retrieve(embed(["say a funny joke"])) == ["jokes"]
    more.save(tmp_path / "index.safetensors")
    again = InstanceIndex.load(tmp_path / "index.safetensors")
    assert again.tasks == more.tasks and torch.equal(again.embeddings_nD, more.embeddings_nD)
    with pytest.raises(ConfigError, match="'jokes' is in the index already"):
        more.add(InstanceIndex.build({"jokes": ["ha"]}, embed))
    with pytest.raises(ConfigError, match="embeddings of size 3"):
        more.add(InstanceIndex(["x"], torch.ones(1, 3), torch.tensor([0])))


def test_what_cannot_be_retrieved_from():
    with pytest.raises(ConfigError, match="there are no tasks"):
        InstanceIndex.build({}, embed)
    with pytest.raises(ConfigError, match="task 'a' has no training texts"):
        InstanceIndex.build({"a": []}, embed)
    index = InstanceIndex.build(TEXTS, embed)
    with pytest.raises(ConfigError, match="no instances of the target"):
        index.retrieve(torch.zeros(0, 26))
    with pytest.raises(ConfigError, match="k is 4; the index has 3 tasks"):
        index.retrieve(torch.zeros(1, 26), 4)


def test_another_file_is_no_index(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not an index of instances"):
        InstanceIndex.load(path)
