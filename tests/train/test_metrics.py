from __future__ import annotations

import random

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.metrics import METRICS, resolve

LABELS = ("against", "favor", "none")


def rows(*targets: str) -> list[dict]:
    return [{"prompt": "", "target": t, "accepted": [t]} for t in targets]


def score(spec: str, predictions: list[str], rows: list[dict], labels=LABELS) -> float:
    return resolve(spec, labels)(predictions, rows)


def test_accuracy_by_hand() -> None:
    assert score("accuracy", ["favor", "none", " none "], rows("favor", "favor", "none")) == pytest.approx(
        2 / 3
    )


def test_accuracy_ignores_alternatives() -> None:
    assert score("accuracy", ["b"], [{"target": "a", "accepted": ["a", "b"]}], None) == 0.0


def test_exact_match_takes_any_accepted_answer() -> None:
    gold = [{"target": "a", "accepted": ["a", "b  c"]}, {"target": "x"}, {"target": "y", "accepted": None}]
    assert score("exact_match", ["b c", " x\n", "Y"], gold, None) == pytest.approx(2 / 3)


def test_exact_match_accepts_the_target_even_when_not_listed() -> None:
    assert score("exact_match", ["a"], [{"target": "a", "accepted": ["b"]}], None) == 1.0


def test_f1_by_hand() -> None:
    gold, found = rows("favor", "favor", "against", "none"), ["favor", "against", "against", "favor"]
    # favor: 1 hit, 2 predicted, 2 wanted -> 1/2; against: 1 hit, 2 predicted, 1 wanted -> 2/3; none: 0
    assert score("f1:favor", found, gold) == pytest.approx(1 / 2)
    assert score("f1:favor,against", found, gold) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert score("f1:favor, against", found, gold) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert score("macro_f1", found, gold) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert score("macro_recall", found, gold) == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_labels_that_never_occur_count_zero() -> None:
    assert score("macro_f1", ["favor"], rows("favor")) == pytest.approx(1 / 3)
    assert score("macro_recall", ["favor"], rows("favor")) == pytest.approx(1 / 3)


def test_a_label_with_a_comma_is_one_label() -> None:
    labels = ("yes, really", "yes", "no")
    assert score("f1:yes, really", ["yes, really"], rows("yes, really"), labels) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_same_as_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = random.Random(seed)
    labels = [f"label {i}" for i in range(5)]
    wanted = rng.choices(labels[: 3 + seed % 3], k=40)
    found = rng.choices([*labels, "not a label"], k=40)
    gold = rows(*wanted)
    kwargs = {"labels": labels, "average": "macro", "zero_division": 0}
    assert score("accuracy", found, gold, labels) == pytest.approx(sklearn.accuracy_score(wanted, found))
    assert score("macro_f1", found, gold, labels) == pytest.approx(sklearn.f1_score(wanted, found, **kwargs))
    assert score("macro_recall", found, gold, labels) == pytest.approx(
        sklearn.recall_score(wanted, found, **kwargs)
    )
    two = kwargs | {"labels": labels[:2]}
    assert score("f1:label 0,label 1", found, gold, labels) == pytest.approx(
        sklearn.f1_score(wanted, found, **two)
    )


def test_token_f1_by_hand() -> None:
    # "the" and "." fall away: {cat, sat} against {cat, sat, down} -> 2 * 2 / 5
    assert score("token_f1", ["The cat sat."], rows("A cat, sat down"), None) == pytest.approx(4 / 5)
    assert score("token_f1", ["x x"], rows("x"), None) == pytest.approx(2 / 3)  # repeats count once
    gold = [{"target": "a dog", "accepted": ["a dog", "hound"]}]
    assert score("token_f1", ["Hound"], gold, None) == 1.0
    assert score("token_f1", ["the", "dog"], rows("a", "the"), None) == pytest.approx(
        1 / 2
    )  # empty after cleaning


def test_rouge_l_by_hand() -> None:
    # longest common subsequence of "a b c d" and "a x c d e" is "a c d": 2 * 3 / (4 + 5)
    assert score("rouge_l", ["a b c d"], rows("a x c d e"), None) == pytest.approx(6 / 9)
    assert score("rouge_l", ["b a"], rows("a b"), None) == pytest.approx(1 / 2)  # order counts
    assert score("rouge_l", ["", ""], rows("a", ""), None) == pytest.approx(1 / 2)
    gold = [{"target": "q r", "accepted": ["q r", "s t"]}]
    assert score("rouge_l", ["s t"], gold, None) == 1.0


def test_every_metric_lies_between_zero_and_one() -> None:
    rng = random.Random(0)
    gold, found = rows(*rng.choices(LABELS, k=30)), rng.choices(LABELS, k=30)
    for name in METRICS:
        assert 0 < score(name, found, gold) < 1
        assert score(name, [r["target"] for r in gold], gold) == 1.0


@pytest.mark.parametrize(
    ("spec", "labels", "message"),
    [
        ("acuracy", LABELS, "accuracy"),
        ("f1:favour", LABELS, "favor"),
        ("f1:favor,favor", LABELS, "twice"),
        ("macro_f1", None, "needs a task with a set of labels"),
        ("f1:favor", None, "needs a task with a set of labels"),
        ("f1", LABELS, "f1:LABEL"),
    ],
)
def test_errors_name_the_nearest(spec: str, labels, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(spec, labels)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 rows"):
        score("accuracy", ["a", "b"], rows("a"))
    with pytest.raises(ValueError, match="at least one row"):
        score("macro_f1", [], [])
