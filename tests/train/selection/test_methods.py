"""Methods of selection: properties that all share, and the formula of each against one written here."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.functional import cosine_similarity

from taskmoe.moe import TaskTable
from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.instances import hashed_words
from taskmoe.train.models import build_model
from taskmoe.train.selection import consistency_diversity as greedy
from taskmoe.train.selection import divergence
from taskmoe.train.selection.base import Options, SelectError, Subject, cosines, read_subject
from taskmoe.train.selection.datamap import confidences, data_map
from taskmoe.train.selection.kinds import METHODS
from taskmoe.train.selection.select import ranking
from taskmoe.train.trained_run import load_run

TWINS = [name for name, method in METHODS.items() if method.options and name != "datamap"]


@pytest.fixture(scope="module")
def subject(run) -> Subject:
    """Of the run; what a test computes is there for the next one."""
    return Subject(*read_subject(str(run), ()), Options(rows=6, answers=True))


@pytest.fixture(scope="module")
def affinity(subject):
    """Method -> its affinity, computed once."""
    found: dict[str, torch.Tensor] = {}

    def of(name: str) -> torch.Tensor:
        if name not in found:
            found[name] = METHODS[name].affinity(subject)
        return found[name]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_what_all_methods_share(name, subject, affinity):
    S_TT, T = affinity(name), len(subject.names)
    assert S_TT.shape == (T, T) == (6, 6) and S_TT.dtype == torch.float64
    between_TT = S_TT[~torch.eye(T, dtype=torch.bool)]
    assert bool(between_TT.isfinite().all())
    if name == "random":
        assert len(between_TT.unique()) == len(between_TT), "no ties"
    if METHODS[name].symmetric:
        assert torch.allclose(S_TT, S_TT.T, atol=1e-12)
        own_T = S_TT.diagonal()
        away_TT = own_T[:, None] + own_T - 2 * S_TT
        assert float(away_TT.min()) > -1e-9 and float(away_TT.max()) > 1e-9
    for t in range(T):
        names = [source for source, _ in ranking(S_TT[t], subject.names, t)]
        assert sorted(names) == sorted(set(subject.names) - {subject.names[t]})


@pytest.mark.parametrize("name", ["random", "semb", "consistency_diversity"])
def test_the_same_again_gives_the_same(name, subject, affinity):
    assert torch.equal(METHODS[name].affinity(subject).nan_to_num(9.0), affinity(name).nan_to_num(9.0))


@pytest.mark.parametrize("name", TWINS)
def test_a_task_with_the_same_words_comes_first(name, subject, affinity):
    for t, target in enumerate(subject.names):
        word, letter = target.split("-")
        first, _ = ranking(affinity(name)[t], subject.names, t)[0]
        assert first == f"{word}-{'b' if letter == 'a' else 'a'}"


def test_ranking_puts_what_is_not_known_last_and_ties_as_they_stand():
    row = torch.tensor([9.0, math.nan, 0.5, 2.0, 0.5])
    assert [source for source, _ in ranking(row, "abcde", 0)] == ["d", "c", "e", "b"]


def test_cosines():
    x = [torch.tensor(v) for v in ([3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-2.0, 0.0])]
    expected = [[1, 0.5**0.5, 0, -1], [0.5**0.5, 1, 0, -(0.5**0.5)], [0, 0, 1, 0], [-1, -(0.5**0.5), 0, 1]]
    assert torch.allclose(cosines(x), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_semb_is_the_cosine_of_mean_embeddings(subject, affinity):
    means = []
    for name in subject.names:
        texts = [f"{row['prompt']} {row['target']}" for row in raw(subject, name)]
        rows = hashed_words(texts, 512)
        means.append((rows / rows.norm(dim=1, keepdim=True)).mean(0))
    for i, j in itertools.combinations(range(6), 2):
        expected = float(cosine_similarity(means[i], means[j], dim=0))
        assert abs(float(affinity("semb")[i, j]) - expected) < 1e-6


def test_textemb_and_gradients_are_of_the_base_that_the_run_left(subject, affinity):
    model: Any = load_run(subject.run.home).plain_base().eval()
    tokenizer, means, gradients, fishers = subject.run.tokenizer, [], [], []
    for name in subject.names:
        states, of_rows = [], []
        task = subject.data.bundle.tasks.id(name)
        for i, row in enumerate(raw(subject, name)):
            ids = tokenizer(f"{row['prompt']} {row['target']}", return_tensors="pt")["input_ids"]
            states.append(model.model(input_ids=ids).last_hidden_state[0].mean(0).detach())
            tokens = subject.data.bundle.splits["train"][task].tokens[i]
            batch = subject.data.collator([{**tokens, "task": task}])
            model.zero_grad()
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1].log_softmax(-1)
            labels = batch["labels"][0, 1:]
            chosen = labels != -100
            (-logits[chosen].gather(1, labels[chosen][:, None]).sum()).backward()
            of_rows.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
        means.append(torch.stack(states).mean(0))
        gradients.append(torch.stack(of_rows).mean(0))
        fishers.append(torch.stack(of_rows).square().mean(0))
    for method, vectors, near in (
        ("textemb", means, 1e-5),
        ("gradient", gradients, 4 / 128),
        ("taskemb", fishers, 4 / 128),
    ):
        expected = torch.stack([cosine_similarity(v, torch.stack(vectors), dim=1) for v in vectors])
        assert float((affinity(method) - expected).abs().max()) < near, method
        assert float(expected.min()) < 0.9, "cosines that differ"


def test_base_as_the_encoder_gives_the_states_of_unit_length(subject):
    other = Subject(subject.config, subject.run, replace(subject.options, encoder="base", answers=False))
    base = build_model(other.config, other.data.tokenizer, other.tasks)
    text = raw(other, "red-a")[0]["prompt"]
    ids = other.data.tokenizer(text, return_tensors="pt")["input_ids"]
    expected = base.base_model(input_ids=ids).last_hidden_state[0].mean(0).detach().double()
    assert torch.allclose(other.embeddings["red-a"][0], expected / expected.norm(), atol=1e-6)


def raw(subject: Subject, name: str) -> list[Any]:
    bundle = subject.data.bundle
    return list(bundle.splits["train"][bundle.tasks.id(name)].raw[: subject.options.rows])


# -- divergence ------------------------------------------------------------------------------------------


def clouds(sizes=(5, 7, 4), dim=3):
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, dim, generator=draw, dtype=torch.float64) * (1 + i) + i for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("name", divergence.MEASURES)
def test_a_divergence_is_symmetric_never_negative_and_zero_for_the_same_rows(name):
    x = clouds()
    D_TT = divergence.MEASURES[name]([*x, x[0].flip(0)])
    assert torch.allclose(D_TT, D_TT.T) and float(D_TT.min()) > -1e-12
    assert float(D_TT.diagonal().abs().max()) < 1e-12 and abs(float(D_TT[0, 3])) < 1e-12
    assert bool((D_TT[0, 1:3] > 1e-3).all()) and float(D_TT[0, 2]) > float(D_TT[0, 1])


@pytest.mark.parametrize(("most", "step"), [(2000, 1), (6, 3)])
def test_mmd_by_loops(most, step, monkeypatch):
    monkeypatch.setattr(divergence, "MEDIAN_ROWS", most)
    x = clouds()
    rows = [r for cloud in x for r in cloud][::step]
    apart = sorted(float((a - b).square().sum()) for a in rows for b in rows if a is not b)
    median = apart[(len(apart) - 1) // 2]

    def mean(a, b):
        kernel = [math.exp(-float((p - q).square().sum()) / (2 * median)) for p in a for q in b]
        return sum(kernel) / len(kernel)

    found = divergence.mmd(x)
    for i, j in itertools.combinations(range(3), 2):
        expected = mean(x[i], x[i]) + mean(x[j], x[j]) - 2 * mean(x[i], x[j])
        assert abs(float(found[i, j]) - expected) < 1e-10


def test_gaussian_divergences_by_their_definitions():
    x = clouds()
    gaussians = [Independent(Normal(c.mean(0), c.std(0, correction=0)), 1) for c in x]
    kl, transport = divergence.kl(x), divergence.wasserstein(x)
    for i, j in itertools.combinations(range(3), 2):
        p, q = gaussians[i], gaussians[j]
        assert torch.allclose(kl[i, j], kl_divergence(p, q) + kl_divergence(q, p))
        expected = (p.mean - q.mean).square().sum() + (p.stddev - q.stddev).square().sum()
        assert torch.allclose(transport[i, j], expected)


# -- consistency and diversity ---------------------------------------------------------------------------


def test_coverage_is_what_a_regression_explains():
    draw = torch.Generator().manual_seed(0)
    target, source = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (9, 3))
    fitted = torch.linalg.lstsq(source.T, target.T).solution.T @ source
    expected = 1 - float((target - fitted).square().sum() / target.square().sum())
    assert abs(greedy.coverage(target, greedy._directions(source)) - expected) < 1e-12
    assert greedy.coverage(target, target.new_zeros(0, 6)) == 0


def test_sources_are_near_first_and_then_cover_what_is_missing():
    axes = torch.eye(4, dtype=torch.float64)
    target = torch.stack([1.2 * axes[0], axes[1]])
    near, nearly = axes[:1], axes[:1] + 0.1 * axes[3:]
    missing, foreign = axes[1:2], axes[2:3]
    # by the cosine alone what is nearly the same would come second
    assert float(cosine_similarity(nearly, target.mean(0))) > float(
        cosine_similarity(missing, target.mean(0))
    )
    assert greedy.order(target, [foreign, nearly, missing, near]) == [3, 2, 1, 0]


def test_rows_of_other_tasks_than_the_target_are_left_out(subject):
    one = Subject(subject.config, subject.run, subject.options, targets=["blue-a"])
    S_TT = METHODS["consistency_diversity"].affinity(one)
    at = one.names.index("blue-a")
    assert sorted(S_TT[at][torch.arange(6) != at].tolist()) == [1, 2, 3, 4, 5]
    assert bool(S_TT[torch.arange(6) != at].isnan().all())


# -- of a run --------------------------------------------------------------------------------------------


def test_routing_compares_shares_of_experts_and_needs_no_data(tmp_path):
    tasks = TaskTable.from_names(["a", "b", "c"])
    gates = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]], [[math.nan, math.nan]]])
    Snapshot("task", {"layer": gates}).save(tmp_path / "routing.safetensors")
    run: Any = SimpleNamespace(checkpoint=tmp_path, tasks=tasks, config=None)
    seen = Subject(None, run, Options(), reads=False)  # type: ignore[arg-type]
    S_TT = METHODS["routing"].affinity(seen)
    assert abs(float(S_TT[0, 1]) - 0.5**0.5) < 1e-12
    assert bool(S_TT[2].isnan().all()) and bool(S_TT[:, 2].isnan().all())
    assert [source for source, _ in ranking(S_TT[0], seen.names, 0)] == ["b", "c"]


def test_size_is_the_number_of_rows(subject, affinity):
    for t, target in enumerate(subject.names):
        first, value = ranking(affinity("size")[t], subject.names, t)[0]
        assert first.endswith("-b") and abs(value - math.log(10)) < 1e-12, target


def test_random_goes_by_the_seed(subject, affinity):
    other = Subject(replace(subject.config, seed=7), subject.run, subject.options, reads=False)
    assert not torch.equal(METHODS["random"].affinity(other), affinity("random"))


def test_data_maps_are_quantiles_of_means_and_deviations_so_far():
    seen = torch.rand(4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, expected = np.linspace(0.1, 0.9, 9), []
    for count in (2, 3, 4):
        part = seen[:count].numpy()
        expected += [*np.quantile(part.mean(0), levels), *np.quantile(part.std(0), levels)]
    assert np.allclose(data_map(seen).numpy(), expected)
    assert torch.equal(data_map(seen), data_map(seen[:, torch.randperm(11)])), "rows have no order"


def test_a_confidence_is_the_geometric_mean_probability_of_the_answer(subject):
    model = load_run(subject.run.home).model
    task = subject.data.bundle.tasks.id("blue-b")
    found = confidences(subject, model, "blue-b")
    assert len(found) == 6
    for i, confidence in enumerate(found.tolist()):
        tokens = subject.data.bundle.splits["train"][task].tokens[i]
        batch = subject.data.collator([{**tokens, "task": task}])
        p = model(input_ids=batch["input_ids"], task_ids=["blue-b"]).logits[0].detach().softmax(-1)
        labels = batch["labels"][0]
        chosen = [float(p[at - 1, labels[at]]) for at in range(1, len(labels)) if labels[at] != -100]
        assert abs(confidence - math.prod(chosen) ** (1 / len(chosen))) < 1e-5


@pytest.mark.parametrize("name", ["taskemb", "gradient", "datamap"])
def test_rows_without_a_loss_of_their_own_are_refused(name, subject):
    pairs: Any = SimpleNamespace(
        config=replace(subject.config, task_type="FEATURE_EXTRACTION"), run=subject.run,
        require_rows_with_losses=lambda m: Subject.require_rows_with_losses(pairs, m),
        require_run=lambda m: subject.run,
    )  # fmt: skip
    with pytest.raises(SelectError, match=f"--method {name}: it needs the loss of single rows"):
        METHODS[name].affinity(pairs)
