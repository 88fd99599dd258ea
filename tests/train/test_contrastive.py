"""InfoNCE spelt out query by query, forward and gradient; ranks of the right text; rows of two ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train.contrastive import gather_rows, info_nce, positive_ranks
from taskmoe.train.data.collator import Collator
from taskmoe.train.micro_batch import task_slice
from taskmoe.train.objectives import count, step_loss, task_losses, token_losses

SETTINGS = [
    {"similarity": similarity, "across_tasks": across, "temperature": temperature}
    for similarity in ("dot", "cosine")
    for across in (False, True)
    for temperature in (1.0, 0.07)
]


def make(seed: int = 0) -> dict:
    """Seven queries of three tasks, their texts in another order, four hard negatives, one text twice."""
    generator = torch.Generator().manual_seed(seed)
    tasks_Q = torch.tensor([0, 0, 0, 1, 1, 2, 0])
    positives = torch.tensor([3, 0, 5, 1, 8, 10, 6])
    tasks_C = torch.zeros(11, dtype=torch.int64)
    tasks_C[positives] = tasks_Q
    tasks_C[[2, 4, 7, 9]] = torch.tensor([0, 1, 1, 0])
    keys_C = torch.arange(11)
    keys_C[5] = keys_C[0]  # queries 1 and 2 want the same text
    return {
        "queries_QD": torch.randn(7, 5, generator=generator, dtype=torch.float64),
        "candidates_CD": torch.randn(11, 5, generator=generator, dtype=torch.float64),
        "positives_Q": positives,
        "tasks_Q": tasks_Q,
        "tasks_C": tasks_C,
        "keys_C": keys_C,
    }


def by_hand(case: dict, similarity: str, across_tasks: bool, temperature: float) -> list[torch.Tensor]:
    """One query after the other, with Python's own sums."""
    losses = []
    for q, own in enumerate(case["positives_Q"].tolist()):
        query = case["queries_QD"][q]
        total, right = 0.0, None
        for c in range(len(case["candidates_CD"])):
            if c != own:
                if not across_tasks and case["tasks_C"][c] != case["tasks_Q"][q]:
                    continue
                if case["keys_C"][c] == case["keys_C"][own]:
                    continue
            candidate = case["candidates_CD"][c]
            score = sum(a * b for a, b in zip(query, candidate, strict=True))
            if similarity == "cosine":
                score = score / (query.square().sum().sqrt() * candidate.square().sum().sqrt())
            weight = (score / temperature).exp()
            total = total + weight
            right = weight if c == own else right
        losses.append(-(right / total).log())
    return losses


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_losses_and_gradients_equal_those_spelt_out(settings):
    case = make()
    weights = torch.randn(7, dtype=torch.float64)
    results = []
    for losses_of in (lambda c: info_nce(**c, **settings), lambda c: torch.stack(by_hand(c, **settings))):
        leaves = {n: case[n].clone().requires_grad_() for n in ("queries_QD", "candidates_CD")}
        losses = losses_of({**case, **leaves})
        (losses * weights).sum().backward()
        results.append([losses.detach(), *(leaf.grad for leaf in leaves.values())])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))


def test_a_tasks_gradient_is_what_its_own_rows_give():
    case = make()
    queries = case["queries_QD"].requires_grad_()
    losses = info_nce(**case)
    (whole,) = torch.autograd.grad(losses[case["tasks_Q"] == 0].sum(), queries, retain_graph=True)
    assert not whole[case["tasks_Q"] != 0].any()
    mine, theirs = (case["tasks_Q"] == 0), (case["tasks_C"] == 0)
    places = torch.cumsum(theirs, 0) - 1
    alone = {
        "queries_QD": queries[mine],
        "candidates_CD": case["candidates_CD"][theirs],
        "positives_Q": places[case["positives_Q"][mine]],
        "tasks_Q": case["tasks_Q"][mine],
        "tasks_C": case["tasks_C"][theirs],
        "keys_C": case["keys_C"][theirs],
    }
    assert torch.allclose(info_nce(**alone), losses[mine], rtol=0, atol=1e-14)


def test_a_query_without_negatives_has_a_loss_and_a_gradient_of_zero():
    case = make()
    queries = case["queries_QD"].requires_grad_()
    losses = info_nce(**case)
    assert float(losses[5].detach()) == 0.0  # the one query of task 2
    losses[5].backward()
    assert not queries.grad.any()


def test_orthogonal_texts_by_arithmetic():
    eye, tasks, places = torch.eye(4), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    losses = info_nce(eye, eye, places, tasks, tasks, temperature=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + 3 * math.exp(-2))] * 4, rel=1e-6)


def test_half_precision_is_computed_in_fp32():
    case = make()
    vectors = ("queries_QD", "candidates_CD")
    half = {**case, **{n: case[n].bfloat16() for n in vectors}}
    full = {**case, **{n: half[n].float() for n in vectors}}
    assert info_nce(**half).dtype == torch.float32
    assert torch.equal(info_nce(**half), info_nce(**full))


def test_ranks_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[0.9, 0.0], [0.0, 0.5], [1.0, 0.0], [5.0, 0.0], [1.0, 2.0]])
    tasks_Q, tasks_C = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 0])
    places = torch.tensor([0, 1, 2, 3])
    found = positive_ranks(queries, texts, places, tasks_Q, tasks_C)
    assert found.tolist() == [3, 2, 2, 1]  # query 0: 0.9 after 1.0 and 1.0
    keys = torch.tensor([7, 1, 7, 3, 4])  # text 2 is text 0
    assert positive_ranks(queries, texts, places, tasks_Q, tasks_C, keys_C=keys).tolist() == [2, 2, 2, 1]
    found = positive_ranks(queries, texts, places, tasks_Q, tasks_C, across_tasks=True)
    assert found.tolist() == [4, 2, 3, 1]


def test_equal_scores_count_against_the_right_text():
    same, tasks = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    assert positive_ranks(same, same, torch.arange(3), tasks, tasks).tolist() == [3, 3, 3]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"contrastive\.similarity: 'l2' is unknown"):
        info_nce(**make(), similarity="l2")
    with pytest.raises(ConfigError, match=r"contrastive\.temperature: 0\.0 must be above 0"):
        info_nce(**make(), temperature=0.0)


def halves_of_a_batch(rank: int | None) -> dict:
    """The whole case, or the part of a rank: four queries on one, three on the other, and their texts."""
    case = make()
    generator = torch.Generator().manual_seed(9)
    case["mix"] = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    if rank is None:
        return case
    queries = slice(0, 4) if rank == 0 else slice(4, 7)
    candidates = slice(0, 6) if rank == 0 else slice(6, 11)
    return {
        **case, "queries_QD": case["queries_QD"][queries], "candidates_CD": case["candidates_CD"][candidates],
        "positives_Q": case["positives_Q"][queries], "tasks_Q": case["tasks_Q"][queries],
        "tasks_C": case["tasks_C"][candidates], "keys_C": case["keys_C"][candidates],
    }  # fmt: skip


def loss_of_a_rank() -> tuple[list[float], torch.Tensor]:
    """Texts pass a shared layer; the losses of this rank's queries among all ranks' texts, its gradient."""
    case = halves_of_a_batch(torch.distributed.get_rank())
    mix = case.pop("mix").requires_grad_()
    candidates, _ = gather_rows(case["candidates_CD"] @ mix)
    losses = info_nce(
        case["queries_QD"] @ mix, candidates, case["positives_Q"], case["tasks_Q"],
        gather_rows(case["tasks_C"])[0], keys_C=gather_rows(case["keys_C"])[0],
    )  # fmt: skip
    losses.sum().backward()
    return losses.tolist(), mix.grad


def test_two_ranks_add_up_to_one(spawn_ranks):
    case = halves_of_a_batch(None)
    mix = case.pop("mix").requires_grad_()
    case["queries_QD"], case["candidates_CD"] = case["queries_QD"] @ mix, case["candidates_CD"] @ mix
    expected = info_nce(**case)
    expected.sum().backward()
    replies = spawn_ranks(loss_of_a_rank)
    assert [loss for losses, _ in replies for loss in losses] == pytest.approx(expected.tolist(), rel=1e-12)
    total = sum(gradient for _, gradient in replies)
    assert float((total - mix.grad).abs().max()) <= 1e-12 * float(mix.grad.abs().max())


def test_alone_rows_are_gathered_as_they_are():
    x = torch.randn(3, 2)
    rows, start = gather_rows(x)
    assert rows is x
    assert start == 0


ROWS = [
    {"task": 1, "input_ids": [5, 6], "labels": [7], "negatives": [[8, 8], [4]]},
    {"task": 0, "input_ids": [3], "labels": [4], "negatives": []},
    {"task": 1, "input_ids": [2], "labels": [4, 4], "negatives": []},
    {"task": 1, "input_ids": [9], "labels": [7], "negatives": [[2]]},
    {"task": 0, "input_ids": [6], "labels": [5, 5], "negatives": []},
]


def vectors_of(batch) -> torch.Tensor:
    """A vector for each text, the same for equal texts: a table of its ids, summed."""
    table = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (table[batch["input_ids"]] * batch["attention_mask"].unsqueeze(-1)).sum(1)


@pytest.fixture
def batch():
    return Collator(SimpleNamespace(pad_token_id=0, eos_token_id=1), "FEATURE_EXTRACTION", 3)(ROWS)


def test_a_batch_is_its_rows_spelt_out(batch):
    """Every query among all texts of its task but those equal to its own."""
    vectors = vectors_of(batch)
    padded = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ids = [row[mask.bool()].tolist() for row, mask in padded]
    found, tasks, _ = token_losses(vectors, batch, "FEATURE_EXTRACTION")
    assert tasks.tolist() == [0, 0, 1, 1, 1]
    for loss, row in zip(found, [ROWS[i] for i in batch["order"]], strict=True):
        mine = [other for other in ROWS if other["task"] == row["task"]]
        texts = [text for other in mine for text in [other["labels"], *other["negatives"]]]
        query, right = (vectors[ids.index(row[n])] for n in ("input_ids", "labels"))
        wrong = [vectors[ids.index(t)] for t in texts if t != row["labels"]]
        scores = torch.stack([query @ right, *(query @ w for w in wrong)])
        assert float(loss) == pytest.approx(float(scores.logsumexp(0) - scores[0]), rel=1e-12)


def test_a_step_counts_queries_and_slices_by_task(batch):
    counts = count(batch, "FEATURE_EXTRACTION", 3)
    assert counts.tokens_T.tolist() == counts.samples_T.tolist() == [2, 3, 0]
    weights = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    vectors = vectors_of(batch)
    whole, sums = step_loss(vectors, batch, counts, weights, task_type="FEATURE_EXTRACTION")
    parts, _ = task_losses(vectors, batch, counts, weights, task_type="FEATURE_EXTRACTION")
    assert float(parts.sum()) == pytest.approx(float(whole), rel=1e-12)
    for task in range(3):
        part = task_slice(batch, task)
        alone, own = step_loss(vectors_of(part), part, counts, weights, task_type="FEATURE_EXTRACTION")
        assert float(alone) == pytest.approx(float(parts[task]), rel=1e-12, abs=1e-15)
        assert float(own[task]) == pytest.approx(float(sums[task]), rel=1e-12, abs=1e-15)


def test_a_batch_without_queries_gives_a_zero_that_is_part_of_the_graph(batch):
    part = task_slice(batch, 2)
    vectors = vectors_of(part).requires_grad_()
    counts = count(batch, "FEATURE_EXTRACTION", 3)
    loss, _ = step_loss(vectors, part, counts, torch.ones(3), task_type="FEATURE_EXTRACTION")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not vectors.grad.any()
