"""What a task of a run uses, as files that other programs read.

Everything is written into a folder of its own first, read again, compared with the run, and only then put in
place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch import Tensor

from taskmoe.moe import collapse
from taskmoe.moe.collapse import Pair
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.merge_weights import merge
from taskmoe.moe.truncate import truncate
from taskmoe.train.export_average import Losses, mean_gates
from taskmoe.train.export_check import difference
from taskmoe.train.export_formats import FORMATS, Format
from taskmoe.train.model_card import write_card
from taskmoe.train.out_folder import ExportError, in_place, require_free, save_base
from taskmoe.train.trained_run import TrainedRun, load_run

ALL = "all"


@dataclass(frozen=True)
class Exported:
    """What was written for one task.

    rank: the largest of its LoRA's linears', 0 where there is none. errors: {linear: |dW - what was written|
    / |dW|} of linears that were cut. difference: the largest between logits of the result and of the run,
    over the largest logit of the run; None: not checked. losses: of the run and of the result on the task's
    rows, where gates were averaged.
    """

    task: str
    folder: Path
    rank: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    difference: float | None = None
    losses: tuple[float, float] | None = None


def export_run(
    run: str | Path,
    task: str,
    out: str | Path,
    kind: str = "peft",
    *,
    max_rank: int | None = None,
    average: bool = False,
    force: bool = False,
    check: bool = True,
) -> list[Exported]:
    """Write a task of a run, or with ``all`` every task.

    Args:
        run: a run folder, or one of its checkpoints.
        out: where to; with ``all``, each task has a folder of its slug in it.
        kind: a name of ``FORMATS``.
        max_rank: LoRAs of a larger rank are cut to it.
        average: the mean gates of a task's tokens in place of those that tokens choose.
        force: replace what is in ``out``.
        check: read the result again and compare.

    Raises:
        ExportError: options that do not go together, or ``out`` is in use, or holds a run.
        CheckError: the result differs from the run: nothing is written then.
        CollapseError: a task cannot be written like that; says why.
        AverageError, SnapshotError: there are no gates of tokens to average.
        TaskError: an unknown task; names the nearest.
        ConfigError, CheckpointError, StateError: as :func:`taskmoe.train.trained_run.load_run`.
    """
    target, cls = Path(out), FORMATS[kind]
    require_free(target, force)
    if check and cls.needs and importlib.util.find_spec(cls.needs) is None:
        raise ExportError(f"the check needs {cls.needs}: pip install {cls.needs}, or give --no_check")
    if not cls.by_task and (task != ALL or max_rank or average):
        raise ExportError(
            f"--format {kind} writes the whole mixture as it is: with --task all, and without "
            "--max_rank and --average"
        )
    trained = load_run(run)
    tasks = trained.model.tasks
    chosen = range(len(tasks)) if task == ALL else [tasks.id(task)]
    means = _Means(trained) if average else None
    with in_place(target) as folder:
        form = cls(trained, save_base(trained, folder, target) if cls.beside_base else None)
        if not cls.by_task:
            form.write(0, None, folder)
            write_card(form, folder, kind)
        found = []
        for number in track(chosen, "exporting", console=Console(stderr=True), disable=len(chosen) < 2):
            slug = tasks[number].slug if cls.by_task and task == ALL else ""
            exported = _export(form, number, folder / slug, max_rank, means, check)
            if cls.by_task:
                write_card(form, folder / slug, kind, exported)
            found.append(replace(exported, folder=target / slug))
    return found


class _Means:
    """What ``--average`` needs of a run."""

    def __init__(self, trained: TrainedRun) -> None:
        self.gates: Mapping[str, Tensor] = mean_gates(trained)
        self.losses = Losses(trained)


def _export(
    form: Format, number: int, folder: Path, max_rank: int | None, means: _Means | None, check: bool
) -> Exported:
    model = form.trained.model
    errors: dict[str, float] = {}
    pairs: Mapping[str, Pair] | None = None
    if any(isinstance(m, MoELinear) for m in model.modules()) and form.by_task:
        pairs = collapse(model, number, None if means is None else means.gates)
    if max_rank is not None:
        if pairs is None:
            raise ExportError(
                f"--max_rank: moe.bank {model.moe_config.bank!r} has no ranks to cut; leave it out"
            )
        pairs, errors = truncate(pairs, max_rank)
    errors = {name: error for name, error in errors.items() if error}
    if form.by_task:
        form.write(number, pairs, folder)
    inexact = pairs if errors or means is not None else None
    losses = None
    if means is not None:
        losses = means.losses.of(number), means.losses.of(number, merge(model, number, pairs))
    return Exported(
        task=model.tasks.names[number],
        folder=folder,
        rank=0 if pairs is None else max(len(pair.A_RK) for pair in pairs.values()),
        errors=errors,
        difference=difference(form, number, folder, inexact) if check else None,
        losses=losses,
    )
