"""Merging: read, merge, choose the coefficient, write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from taskmoe.moe.collapse import Pair
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.merging.kinds import merge_loras, merger
from taskmoe.moe.peft_write import write_lora
from taskmoe.moe.wrappers import inside
from taskmoe.train.merging.card import write_card
from taskmoe.train.merging.model import MergedModel, Scorer, require_linears
from taskmoe.train.merging.sources import TASKS, Gathered, MergeError, gather
from taskmoe.train.out_folder import in_place, require_free, save_base
from taskmoe.train.trained_run import TrainedRun

PEFT, RUN = "peft", "run"


@dataclass(frozen=True)
class Choice:
    """How one coefficient does. scores: {task: the value of its own metric}; score: their mean, over groups;
    loss: the mean over tasks."""

    coefficient: float
    score: float
    loss: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """loras: names of what was merged. rank: the largest of the linears'. errors: {linear: |dW - what was
    written| / |dW|} of those that were cut. choices: of the coefficients tried, on ``held_in`` alone."""

    out: Path
    method: str
    options: dict[str, Any]
    coefficient: float
    loras: list[str]
    rank: int
    errors: dict[str, float]
    held_in: list[str]
    split: str
    choices: list[Choice]


def merge(
    paths: Sequence[str],
    method: str,
    out: str | Path,
    kind: str = PEFT,
    *,
    over: str = TASKS,
    tasks: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] = (),
    held_in: Sequence[str] | None = None,
    split: str = "validation",
    run: str | None = None,
    max_rank: int | None = None,
    force: bool = False,
) -> Result:
    """Merge LoRAs of one base into one.

    Args:
        paths, over, tasks, run: as for :func:`taskmoe.train.merging.sources.gather`.
        method, options: of ``taskmoe.moe.merging``.
        out: the folder to write; kind: an adapter of peft, or a run of no steps.
        coefficients: what the result is multiplied by; (): the method's default. Of several, that with the
            best score on ``held_in`` is taken; no other task's rows are looked at. At equal scores the loss
            decides, then the order.
        held_in: names of tasks; None: the merged ones. split: of which rows.
        max_rank: linears of a larger rank are cut to it.
        force: replace what is in ``out``.

    Raises:
        MergeError: as ``gather``, or options that do not go together.
        ExportError: ``out`` is in use, or holds a run.
        ConfigError: a method, option or value that cannot be used, or a run's data cannot be read.
        TaskError: an unknown task.
    """
    target = Path(out)
    require_free(target, force)
    default = merger(method, options).coefficient
    given = gather(paths, over, tasks, run)
    if len(given.loras) < 2:
        raise MergeError(f"{next(iter(given.loras), paths[0])} is the only LoRA: there is nothing to merge")
    home = given.runs[0] if given.runs else None
    _check(given, home, kind, coefficients, held_in)
    # All methods give something proportional to the coefficient, so that one merge serves them all.
    once = merge_loras(list(given.loras.values()), method, 1.0, options, max_rank, _watch)
    if home is not None:
        require_linears(home, once.pairs)
    chosen_by = list(held_in or given.tasks) if len(coefficients) > 1 else []
    choices: list[Choice] = []
    if home is not None and len(coefficients) > 1:
        choices = _try(MergedModel(home, once.pairs), coefficients, chosen_by, split)
        coefficient = max(choices, key=lambda choice: (choice.score, -choice.loss)).coefficient
    else:
        coefficient = coefficients[0] if coefficients else default
    pairs = {name: Pair(A, coefficient * B) for name, (A, B) in once.pairs.items()}
    result = Result(
        out=target,
        method=method,
        options=dict(options or {}),
        coefficient=coefficient,
        loras=list(given.loras),
        rank=once.rank,
        errors={name: error for name, error in once.errors.items() if error},
        held_in=chosen_by,
        split=split,
        choices=choices,
    )
    _write(given, home, kind, pairs, result)
    return result


def _check(
    given: Gathered,
    home: TrainedRun | None,
    kind: str,
    coefficients: Sequence[float],
    held_in: Sequence[str] | None,
) -> None:
    several = len(coefficients) > 1
    if home is None and (several or kind == RUN):
        what = "several coefficients are tried on its rows" if several else "it has the tasks and the data"
        raise MergeError(f"no run is given, and {what}; name one with --run")
    if held_in and not several:
        raise MergeError("--held_in: has no effect with one coefficient; give several to choose from")
    if several and not held_in and not given.tasks:
        raise MergeError("--held_in: name the tasks that choose the coefficient: none was merged by name")
    if not several:
        return
    assert home is not None
    for task in held_in or ():
        home.model.tasks.id(task)
    strange = [task for task in given.tasks if task not in home.model.tasks]
    if strange and not held_in:
        raise MergeError(
            f"--held_in: {strange[0]} was merged, but {home.home}, whose rows choose the coefficient, has no "
            "such task; name tasks of it, or with --run a run that has all"
        )


def _watch(found: Iterable[Any], total: int) -> Iterable[Any]:
    return track(found, "merging", total, console=Console(stderr=True), transient=True)


def _try(
    merged: MergedModel, coefficients: Sequence[float], held_in: Sequence[str], split: str
) -> list[Choice]:
    scorer, choices = Scorer(merged, split), []
    if empty := [task for task in held_in if not scorer.rows(task)]:
        raise MergeError(f"--held_in: {empty[0]} has no {split} rows; leave it out, or give another --split")
    for c in track(coefficients, "coefficients", console=Console(stderr=True), transient=True):
        found = scorer.of(c, held_in)
        scores = {task: own[own["metric"]] for task, own in found["tasks"].items()}
        choices.append(Choice(c, found["score"], found["macro"]["loss"], scores))
    return choices


def _write(
    given: Gathered, home: TrainedRun | None, kind: str, pairs: dict[str, Pair], result: Result
) -> None:
    with in_place(result.out) as folder:
        if kind == RUN:
            assert home is not None
            MergedModel(home, pairs).save_run(folder, result.out)
        elif home is None:
            assert given.about_base is not None
            write_lora(given.about_base, pairs, folder)
        else:
            save_base(home, folder, result.out)
            base = inside(home.model.base_model)[0]
            whole = {n: m.saved for n, m in base.named_modules() if isinstance(m, SavedModule)}
            write_lora(base, pairs, folder, whole=whole)
        write_card(result, kind, home, folder)
