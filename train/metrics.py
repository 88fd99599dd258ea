"""Metrics: pure functions from predicted texts and raw rows to one number in [0, 1].

Every metric takes ``(predictions, rows, labels)``: the predicted texts, the raw rows (dicts with ``target``
and, where several answers are right, ``accepted``), and the task's label set or None. :func:`resolve` turns a
spec such as ``"macro_f1"`` or ``"f1:favor,against"`` into a function of ``(predictions, rows)``.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from taskmoe.moe.config import ConfigError

Row = Mapping[str, Any]
Labels = Sequence[str] | None
Metric = Callable[[Sequence[str], Sequence[Row]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Strip and collapse whitespace; case is kept, because in text-to-text tasks case can be the answer."""
    return " ".join(text.split())


def accepted_answers(row: Row) -> list[str]:
    """The right answers of a row: its target and its accepted alternatives, without repeats."""
    return list(dict.fromkeys([row["target"], *(row.get("accepted") or ())]))


def _check(predictions: Sequence[str], rows: Sequence[Row]) -> None:
    if len(predictions) != len(rows):
        raise ValueError(f"{len(predictions)} predictions for {len(rows)} rows")
    if not rows:
        raise ValueError("a metric needs at least one row")


def _mean_best(score: Callable[[str, str], float], predictions: Sequence[str], rows: Sequence[Row]) -> float:
    """Mean over rows of the best score over the row's accepted answers."""
    _check(predictions, rows)
    best = (
        max(score(prediction, answer) for answer in accepted_answers(row))
        for prediction, row in zip(predictions, rows, strict=True)
    )
    return sum(best) / len(rows)


def accuracy(predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None) -> float:
    """Share of rows whose prediction is the target (after :func:`normalise`; alternatives do not count)."""
    _check(predictions, rows)
    hits = (normalise(p) == normalise(row["target"]) for p, row in zip(predictions, rows, strict=True))
    return sum(hits) / len(rows)


def exact_match(predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None) -> float:
    """Share of rows whose prediction is an accepted answer (after :func:`normalise`; case counts)."""
    return _mean_best(lambda p, answer: float(normalise(p) == normalise(answer)), predictions, rows)


def _squad_tokens(text: str) -> list[str]:
    """Lower case, no punctuation, no articles, split at whitespace."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _token_f1(prediction: str, answer: str) -> float:
    found, wanted = _squad_tokens(prediction), _squad_tokens(answer)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def token_f1(predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None) -> float:
    """F1 over bags of tokens, best over the accepted answers, mean over rows.

    Normalised as SQuAD does (Rajpurkar et al., 2016): lower case, without punctuation and articles.
    """
    return _mean_best(_token_f1, predictions, rows)


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _rouge_l(prediction: str, answer: str) -> float:
    found, wanted = prediction.split(), answer.split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * _lcs(found, wanted) / (len(found) + len(wanted))


def rouge_l(predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None) -> float:
    """ROUGE-L F-measure (Lin, 2004): longest common subsequence, best over the accepted answers, mean.

    Tokens are split at whitespace and compared as they are: no stemming, no lower-casing.
    """
    return _mean_best(_rouge_l, predictions, rows)


def _counts(
    predictions: Sequence[str], rows: Sequence[Row], labels: Sequence[str]
) -> dict[str, tuple[int, int, int]]:
    """Per label: rows where prediction and target agree on it, rows predicted so, rows that are so."""
    _check(predictions, rows)
    found = [normalise(p) for p in predictions]
    wanted = [normalise(row["target"]) for row in rows]
    hits = Counter(f for f, w in zip(found, wanted, strict=True) if f == w)
    n_found, n_wanted = Counter(found), Counter(wanted)
    return {label: (hits[k], n_found[k], n_wanted[k]) for label in labels for k in [normalise(label)]}


def _need_labels(name: str, labels: Labels) -> Sequence[str]:
    if not labels:
        raise ConfigError(
            f"metric {name!r} needs a task with a set of labels, and this one has none; "
            "use exact_match, token_f1 or rouge_l"
        )
    return labels


def f1(
    predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None, *, of: Sequence[str] = ()
) -> float:
    """F1 of one class, or the mean over the classes ``of``; a class neither found nor wanted counts 0."""
    counts = _counts(predictions, rows, of)
    scores = [2 * hits / (n_found + n_wanted) if hits else 0.0 for hits, n_found, n_wanted in counts.values()]
    return sum(scores) / len(scores)


def macro_f1(predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None) -> float:
    """Mean F1 over the task's whole label set; a label neither present nor predicted counts 0.

    Raises:
        ConfigError: the task has no label set.
    """
    return f1(predictions, rows, of=_need_labels("macro_f1", labels))


def macro_recall(predictions: Sequence[str], rows: Sequence[Row], labels: Labels = None) -> float:
    """Mean recall over the task's whole label set; a label that no row has counts 0.

    Raises:
        ConfigError: the task has no label set.
    """
    counts = _counts(predictions, rows, _need_labels("macro_recall", labels))
    scores = [hits / n_wanted if hits else 0.0 for hits, _, n_wanted in counts.values()]
    return sum(scores) / len(scores)


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:8])


def resolve(spec: str, labels: Labels) -> Metric:
    """The metric a spec names: a key of :data:`METRICS`, or ``f1:LABEL[,LABEL...]``.

    Args:
        spec: for example ``"accuracy"``, ``"macro_f1"``, ``"f1:irony"``, ``"f1:favor,against"``.
        labels: the task's label set, or None.

    Returns:
        A function of ``(predictions, rows)`` that gives a float in [0, 1]; it raises ValueError when there
        are no rows or the two lengths differ.

    Raises:
        ConfigError: no such metric, no such label, or a metric of classes for a task without labels.
    """
    name, _, argument = spec.partition(":")
    if name == "f1" and argument:
        known = _need_labels(spec, labels)
        # A label may itself contain a comma: the whole argument is tried as one label first.
        of = [argument] if argument in known else [part.strip() for part in argument.split(",")]
        for label in of:
            if label not in known:
                raise ConfigError(
                    f"metric {spec!r}: no label {label!r}; the nearest are {_nearest(label, known)}"
                )
        if len(set(of)) != len(of):
            raise ConfigError(f"metric {spec!r} names a label twice")
        return partial(f1, of=tuple(of))
    if spec == "f1":
        raise ConfigError("metric 'f1' needs its classes: f1:LABEL or f1:LABEL,LABEL")
    if spec not in METRICS:
        raise ConfigError(f"unknown metric {spec!r}; the nearest are {_nearest(spec, list(METRICS))}")
    if spec in NEED_LABELS:
        _need_labels(spec, labels)
    return partial(METRICS[spec], labels=labels)


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "macro_recall": macro_recall,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}
NEED_LABELS = ("macro_f1", "macro_recall")
