"""The baseline without training of the encoder: logistic regression on its mean-pooled output.

The encoder runs once over all rows, in batches of similar length; its output is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from taskmoe.train.config import Config
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.evaluate import primary_metrics
from taskmoe.train.metrics import resolve
from taskmoe.train.models import build_model
from taskmoe.train.setup import Data

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)  # C, the inverse of the penalty; features are standardised


def logistic(config: Config, data: Data, split: str, cache: Path) -> dict[str, Any]:
    """Fit every task on all its training rows and predict ``split``.

    C is chosen by three-fold cross-validation on the training rows, by the task's own metric.

    Returns:
        ``{"predictions": {task: [text]}, "C": {task: C}, "rows": training rows, "seconds"}``; the seconds
        leave out the encoder where its output was on disk.
    """
    start = time.monotonic()
    bundle = data.bundle
    found: dict[str, Any] = {"predictions": {}, "C": {}, "rows": 0}
    encoder = build_model(config, data.tokenizer, bundle.tasks)
    for task, spec in zip(bundle.tasks, primary_metrics(config, bundle.tasks), strict=True):
        index = bundle.tasks.id(task.name)
        train, test = bundle.splits["train"][index], bundle.splits[split][index]
        inputs = [
            _embedded(encoder, s, data, config, cache / f"{task.slug}-{n}")
            for n, s in (("train", train), (split, test))
        ]
        targets = [row["target"] for row in train.raw]
        metric = resolve(spec, task.labels)
        scorer = make_scorer(_by_text(metric))
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3)),
            {"logisticregression__C": list(STRENGTHS)},
            scoring=scorer,
            cv=StratifiedKFold(3, shuffle=True, random_state=0),
        )
        search.fit(inputs[0], targets)
        found["predictions"][task.name] = [str(p) for p in search.predict(inputs[1])]
        found["C"][task.name] = search.best_params_["logisticregression__C"]
        found["rows"] += len(targets)
    found["seconds"] = time.monotonic() - start
    return found


def _by_text(metric: Any) -> Any:
    def of(wanted: Any, found: Any) -> float:
        return metric([str(f) for f in found], [{"target": str(w)} for w in wanted])

    return of


@torch.no_grad()
def embed(encoder: Any, split: TaskSplit, data: Data, tokens_a_batch: int = 4096) -> np.ndarray:
    """Mean of the last hidden state over a row's tokens, [rows, width] float32, in the order of the rows."""
    lengths = np.array(split.tokens["length"])
    ids = list(split.tokens["input_ids"])
    out = np.zeros((len(lengths), encoder.config.hidden_size), np.float32)
    order, at = np.argsort(lengths, kind="stable"), 0
    while at < len(order):
        longest = lengths[order[min(len(order), at + 256) - 1]]
        rows = order[at : at + max(1, min(256, tokens_a_batch // int(longest)))]
        at += len(rows)
        batch = data.tokenizer.pad({"input_ids": [list(ids[r]) for r in rows]}, return_tensors="pt")
        mask = batch["attention_mask"]
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).float()
        out[rows] = ((hidden * weight).sum(1) / weight.sum(1)).numpy()
    return out


def _embedded(encoder: Any, split: TaskSplit, data: Data, config: Config, stem: Path) -> np.ndarray:
    """:func:`embed`, from disk where these rows were embedded by this model before."""
    about = json.dumps([config.model_name_or_path, config.data.max_length, config.bf16])
    key = hashlib.sha256(about.encode())
    for ids in split.tokens["input_ids"]:
        key.update(np.array(ids, np.int64).tobytes() + b"|")
    path = stem.with_name(f"{stem.name}-{key.hexdigest()[:16]}.npy")
    if path.exists():
        return np.load(path)
    found = embed(encoder, split, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part.npy")
    np.save(whole, found)
    os.replace(whole, path)
    return found
