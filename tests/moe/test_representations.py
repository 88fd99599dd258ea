"""Vectors of tasks that are given: files, what is saved, tasks that are added."""

from __future__ import annotations

import json

import pytest
import torch

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, TaskTable, attach, load_adapter
from taskmoe.moe.growth import grow
from taskmoe.moe.model import task_dims
from taskmoe.moe.representations.files import read_vectors, write_vectors

NAMES = ["sort", "sum", "translate", "copy", "more"]
VECTORS = {n: torch.randn(5, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(NAMES)}


@pytest.fixture(params=["safetensors", "json"])
def path(request, tmp_path):
    path = tmp_path / f"vectors.{request.param}"
    if request.param == "json":
        path.write_text(json.dumps({n: v.tolist() for n, v in VECTORS.items()}))
    else:
        write_vectors(VECTORS, path)
    return path


def config(path, representation="frozen", **options):
    return TaskMoEConfig(
        r=2, num_experts=3, router="task_linear", router_scope="layer", representation=representation,
        representation_options={"path": None if path is None else str(path), **options},
        **({"task_embedding_dim": 5} if representation == "learned" else {}),
    )  # fmt: skip


def test_frozen_vectors_are_those_of_the_file_and_do_not_train(path, tiny, batch, head, gradients, close):
    model = attach(tiny("llama"), config(path), NAMES[:3])
    tasks = torch.tensor([2, 0])
    expected = torch.stack([VECTORS["translate"], VECTORS["sort"]])
    assert torch.equal(model.routing.representation(tasks), expected)
    assert not [n for n in model.trainable_names() if "representation" in n]
    assert task_dims(model) == {"routing.representation.vectors_TD": 0}
    router = model.routing.router
    logits = model.routing.logits(tasks)
    expected = torch.einsum("td,sde->ste", model.routing.representation.vectors_TD[tasks], router.w_SDE)
    close(logits.squeeze(2), expected)
    found = gradients(model, head(model(**batch("llama", [0, 1, 2]))).square().sum())
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_normalised_over_the_tasks_that_training_began_with(path, tiny, tmp_path):
    first = attach(tiny("llama"), config(path, normalise=True), NAMES[:4])
    found = first.routing.representation(torch.arange(4))
    assert torch.allclose(found.mean(0), torch.zeros(5), atol=1e-6)
    assert torch.allclose(found.std(0, correction=0), torch.ones(5), atol=1e-5)
    first.save_pretrained(tmp_path / "adapter")
    grown = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "adapter", TaskTable.from_names(NAMES))
    assert torch.equal(grown.routing.representation(torch.arange(4)), found)
    start = torch.stack([VECTORS[n] for n in NAMES[:4]])
    by_hand = (VECTORS["more"] - start.mean(0)) / start.std(0, correction=0)
    assert torch.allclose(grown.routing.representation(torch.tensor([4]))[0], by_hand, atol=1e-5)


def test_one_task_alone_keeps_its_vector(path, tiny, tmp_path):
    one = attach(tiny("llama"), config(path, normalise=True), NAMES[:1])
    assert torch.equal(one.routing.representation(torch.tensor([0]))[0], VECTORS["sort"])
    one.save_pretrained(tmp_path / "adapter")
    grown = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "adapter", TaskTable.from_names(NAMES[:2]))
    expected = torch.stack([VECTORS["sort"], VECTORS["sum"]])
    assert torch.equal(grown.routing.representation(torch.arange(2)), expected)


@pytest.mark.parametrize("representation", ["frozen", "learned"])
def test_a_saved_adapter_needs_its_file_no_more(representation, path, tiny, shaken, batch, head, tmp_path):
    model = shaken(attach(tiny("llama"), config(path, representation), NAMES[:3])).eval()
    expected = head(model(**batch("llama", [2, 0, 1])))
    model.save_pretrained(tmp_path / "adapter")
    beside = read_vectors(tmp_path / "adapter" / "task_vectors.safetensors")
    assert list(beside) == sorted(NAMES[:3])
    path.unlink()
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert torch.equal(head(again(**batch("llama", [2, 0, 1]))), expected)


def test_known_tasks_keep_the_vectors_they_were_trained_with(path, tiny, tmp_path):
    attach(tiny("llama"), config(path), NAMES[:3]).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({n: [9.0] * 5 for n in NAMES}))
    grown = attach(tiny("llama"), config(other), NAMES[:4])
    load_adapter(grown, tmp_path / "adapter")
    vectors_TD = grown.routing.representation(torch.arange(4))
    assert torch.equal(vectors_TD[:3], torch.stack([VECTORS[n] for n in NAMES[:3]]))
    assert torch.equal(vectors_TD[3], torch.full((5,), 9.0)), "a new one is the file's"


def test_learned_vectors_may_begin_at_given_ones(path, tiny):
    model = attach(tiny("llama"), config(path, "learned"), NAMES[:3])
    embedding_TD = model.routing.representation.embedding_TD
    assert embedding_TD.requires_grad
    assert torch.equal(embedding_TD.detach(), torch.stack([VECTORS[n] for n in NAMES[:3]]))
    with pytest.raises(ConfigError, match=r"moe.task_embedding_dim: 64, but the vectors of .* have 5"):
        wrong = TaskMoEConfig(router="task_mlp", representation_options={"path": str(path)})
        attach(tiny("llama"), wrong, NAMES[:3])


@pytest.mark.parametrize("how", ["load", "grow"])
def test_a_new_task_begins_at_its_given_vector(how, path, tiny, shaken, tmp_path):
    old = shaken(attach(tiny("llama"), config(path, "learned"), NAMES[:3]))
    old.save_pretrained(tmp_path / "adapter")
    more = TaskTable.from_names(NAMES)
    if how == "grow":
        new = grow(tiny("llama"), tmp_path / "adapter", 3, more)
    else:
        new = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "adapter", more)
    vectors_TD = new.routing.representation.embedding_TD.detach()
    assert torch.equal(vectors_TD[:3], old.routing.representation.embedding_TD), "as trained"
    assert torch.equal(vectors_TD[3:], torch.stack([VECTORS[n] for n in NAMES[3:]]))


@pytest.mark.parametrize("representation", ["frozen", "text"])
def test_a_task_without_a_vector_is_named(representation, path, tiny):
    with pytest.raises(ConfigError, match=r"moe.representation_options.path: .*: no vector for task 'sing'"):
        attach(tiny("llama"), config(path, representation), ["sort", "sing"], dry_run=False)
    with pytest.raises(ConfigError, match=r"moe.representation_options.path: none given; "):
        attach(tiny("llama"), config(None, representation), ["sort"], dry_run=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no readable"),
        ("[1, 2]", "no readable"),
        ('{"sort": ["a"]}', "no readable"),
        ('{"sort": [1, 2], "sum": [1]}', "has shapes"),
        ('{"sort": [[1, 2]]}', "has shapes"),
        ("{}", "has shapes"),
        ('{"sort": [1, NaN]}', "the vector of 'sort' is not finite"),
    ],
)
def test_files_that_cannot_be_used(text, message, tmp_path):
    path = tmp_path / "vectors.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"moe.representation_options.path: .*vectors.json: {message}"):
        read_vectors(path)
    with pytest.raises(ConfigError, match="no readable"):
        read_vectors(tmp_path / "missing.safetensors")
