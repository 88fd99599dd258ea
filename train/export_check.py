"""Whether what was exported, in the hands of its users, says what the run says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.dry_run import example_inputs
from taskmoe.moe.merge_weights import merge
from taskmoe.train.export_formats import Format
from taskmoe.train.instances import router_options

BOUND = 1e-5  # of the largest logit, in float32


class CheckError(ValueError):
    """The exported files do not say what they should."""


@torch.no_grad()
def difference(form: Format, task: int, folder: Path, inexact: Mapping[str, Pair] | None) -> float:
    """The largest difference of logits between the run and what was written, over the run's largest logit.

    On a few made-up sequences, in float32.

    Args:
        inexact: pairs that were written in place of the task's own, which are then compared, merged; None:
            the run is what must come back.

    Raises:
        CheckError: more than ``BOUND`` from what should have been written.
    """
    model = form.trained.model
    inputs = example_inputs(form.inner)
    mine = {**inputs, **_instances(form, len(inputs["input_ids"]))}
    with torch.random.fork_rng(devices=[]):  # routers that draw do so alike
        torch.manual_seed(0)
        expected = model(**mine, task_ids=[task] * len(inputs["input_ids"])).logits
        again = form.read(task, folder)
        torch.manual_seed(0)
        found = again(**(inputs if form.by_task else mine)).logits
    apart = _apart(found, expected)
    wrong = apart if inexact is None else _apart(found, merge(model, task, inexact)(**inputs).logits)
    if not wrong <= BOUND:
        raise CheckError(
            f"task {model.tasks.names[task]!r}: read again, the logits are {wrong:.1e} of the largest away "
            f"from what they should be, more than {BOUND:.0e}; nothing was written (--no_check writes it)"
        )
    return apart


def _instances(form: Format, rows: int) -> dict[str, Tensor]:
    """What routers that read instances are told of them."""
    options = router_options(form.trained.config)
    if options is None:
        return {}
    return {"instance_embeddings": torch.randn(rows, options.dim, generator=torch.Generator().manual_seed(0))}


def _apart(found: Tensor, expected: Tensor) -> float:
    """Of the largest expected logit; infinite where there are more or fewer. A head alone has none beyond its
    labels, where a mixture has -inf, and a prompt of peft gives logits at its own positions first."""
    outputs = found.shape[-1]
    if outputs > expected.shape[-1] or not bool((expected[..., outputs:] == float("-inf")).all()):
        return float("inf")
    if found.dim() == 3:
        found = found[:, -expected.shape[1] :]
    expected = expected[..., :outputs]
    apart = (found - expected).masked_fill(found == expected, 0.0)  # -inf stands beyond a task's labels
    return float(apart.abs().max() / expected[expected.isfinite()].abs().max())
