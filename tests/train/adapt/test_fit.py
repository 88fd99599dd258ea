"""How what belongs to new tasks is learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taskmoe.train.adapt.data import draw_shots, read_new_tasks
from taskmoe.train.adapt.fit import Fitter
from taskmoe.train.adapt.subjects import Loras
from taskmoe.train.trained_run import open_run


def test_validation_rows_come_in_batches_of_evaluation(run, settings, tmp_path, monkeypatch):
    """However many they are, no more than so many rows run at once, and the mean is over their targets."""
    opened, chosen = open_run(run), settings()
    new = read_new_tasks(opened, chosen)
    subject = Loras(opened, new, chosen, tmp_path, torch.device("cpu"))
    splits = subject.split("train")
    shots = {t: draw_shots(splits[t], str(t), None, 0, 0.6) for t in subject.ids}
    assert [len(s.validation) for s in shots.values()] == [7, 7]
    seen: list[int] = []

    def losses_with(size: int) -> dict[int, float]:
        config = replace(opened.config, per_device_eval_batch_size=size)
        fitter = Fitter(subject.model, splits, shots, subject.collate, config, chosen, 0)
        plain, counted = fitter.collate, lambda rows: (seen.append(len(rows)), plain(rows))[1]
        monkeypatch.setattr(fitter, "collate", counted)
        return fitter._validate(subject.ids)

    whole = losses_with(100)
    assert seen == [14]
    seen.clear()
    assert losses_with(3) == pytest.approx(whole, rel=1e-5) and len(set(whole.values())) == 2
    assert sum(seen) == 14 and max(seen) == 3
