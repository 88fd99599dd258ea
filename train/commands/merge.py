"""``taskmoe merge``: several LoRAs as one."""

from __future__ import annotations

import math
from typing import Any

from taskmoe.train.command_line import UsageError, folders, take_option, take_switch

USAGE = """\
usage: taskmoe merge SOURCE ... --method NAME --out DIR [--over tasks|experts] [--tasks A,B]
                     [--options K=V,...] [--coefficient C[,C...]] [--held_in A,B] [--split SPLIT]
                     [--run RUN] [--max_rank N] [--format peft|run] [--force] [--json]

Merge LoRAs of one base model into one LoRA for all tasks. A SOURCE is a run, or one of its checkpoints; an
adapter that peft or taskmoe export wrote; or a folder of such adapters.

  --method           on deltas, the products of the factors, exactly:
                       concatenation     the mean, or a weighted sum   options: weights
                       svd_mean          the mean, at a LoRA's rank    options: rank
                     on deltas, or with space=factors on A and on B:
                       task_arithmetic   the sum
                       ties              signs elected                 options: density
                       breadcrumbs       entries of middling size      options: drop, keep, scope
                     on factors:
                       copa              pruned and scaled up          options: density, floor
  --out DIR          a folder that does not exist, or is empty
  --over tasks       of a run, what each task uses (default); experts: each expert of its bank
  --tasks A,B        of runs, these tasks alone
  --options K=V,...  of the method, for example density=0.3,space=factors
  --coefficient C    what the result is multiplied by; default: 1, of task_arithmetic and breadcrumbs 0.4, of
                     copa 4. Of several, the one with the best score is taken
  --held_in A,B      the tasks that choose it, and no others; default: the merged ones
  --split SPLIT      of which rows; default: validation
  --run RUN          the run that has their base and data, where none is merged
  --max_rank N       cut to this rank; the error of each linear is told
  --format peft      an adapter of peft (default); where the base was trained too, it is saved in DIR/base
  --format run       a run of no steps, for taskmoe eval: the tasks, heads and data of the (first) run
  --force            replace an earlier result in DIR
  --json             print one JSON object and nothing else

examples:
  taskmoe merge runs/poly --method ties --coefficient 0.5,1,1.5,2 --out merged --format run
  taskmoe merge loras/qa loras/sum --method concatenation --options weights=[0.7,0.3] --out both
  taskmoe merge runs/quickstart --over experts --method svd_mean --max_rank 8 --out mean
"""


def run(tokens: list[str]) -> int:
    """``merge SOURCE ... --method NAME --out DIR [...]``, see ``USAGE``."""
    settings: dict[str, Any] = {}
    method, tokens = take_option(tokens, "method")
    out, tokens = take_option(tokens, "out")
    kind, tokens = take_option(tokens, "format")
    for name in ("over", "split", "run"):
        value, tokens = take_option(tokens, name)
        settings |= {} if value is None else {name: value}
    for name in ("tasks", "held_in"):
        value, tokens = take_option(tokens, name)
        settings |= {} if value is None else {name: [n.strip() for n in value.split(",") if n.strip()]}
    coefficient, tokens = take_option(tokens, "coefficient")
    options, tokens = take_option(tokens, "options")
    rank, tokens = take_option(tokens, "max_rank")
    force, tokens = take_switch(tokens, "force")
    as_json, tokens = take_switch(tokens, "json")
    sources = folders(tokens, "merge", "SOURCE")
    if method is None or out is None:
        raise UsageError(f"merge: --{'out' if method else 'method'} is missing; see taskmoe merge --help")
    _one_of("format", kind, ("peft", "run"))
    _one_of("over", settings.get("over"), ("tasks", "experts"))
    _one_of("split", settings.get("split"), ("train", "validation", "test"))
    if rank is not None and not (rank.isdigit() and int(rank)):
        raise UsageError(f"--max_rank: {rank!r} is not a whole number, at least 1")
    settings |= {"force": force, "max_rank": None if rank is None else int(rank)}
    settings |= {"coefficients": _numbers(coefficient), "options": _options(options)}
    from taskmoe.train.merging.view import show

    return show(sources, method, out, kind or "peft", as_json, **settings)


def _one_of(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        import difflib

        near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise UsageError(f"--{option}: {value!r} is not one of {', '.join(known)}; the nearest is {near!r}")


def _numbers(text: str | None) -> list[float]:
    try:
        found = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError(f"--coefficient: {text!r} is not a number, or several with commas")
    return found


def _options(text: str | None) -> dict[str, Any]:
    import yaml

    try:
        found = dict(yaml.safe_load("{" + (text or "").replace("=", ": ") + "}"))
    except yaml.YAMLError:
        found = {"": None}
    if None in found.values():
        raise UsageError(f"--options: {text!r} is not KEY=VALUE, or several with commas")
    return found
