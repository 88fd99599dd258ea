"""``taskmoe export``: what one task of a run uses, as files that other programs read."""

from __future__ import annotations

import difflib

from taskmoe.train.command_line import UsageError, folders, take_option, take_switch

FORMATS = ("peft", "merged", "taskmoe")
USAGE = """\
usage: taskmoe export RUN --task NAME|all --out DIR [--format peft|merged|taskmoe] [--max_rank N] [--average]
                      [--force] [--no_check] [--json]

Write what a task of a run, or of one checkpoint in it, uses: exactly, where routing depends on the task
alone. One task goes straight into DIR, all tasks into a folder each, every folder with a README.md. What was
written is read again, and its logits are compared with the run's, before it takes its place.
docs/EXPORT.md says more.

  --task NAME|all    a task of the run
  --out DIR          a folder that does not exist, or is empty
  --format peft      an adapter that peft and vLLM load (default); where the base was trained too, or built
                     from settings, it is saved in DIR/base
  --format merged    a plain Hugging Face model: the base with what the experts add in its weights
  --format taskmoe   the whole mixture, as TaskMoEModel.from_pretrained reads it; with --task all
  --max_rank N       cut LoRAs down to this rank; the error of each linear is told
  --average          where tokens are routed: a LoRA with the mean gates of the task's tokens, and its loss
  --force            replace an earlier result in DIR
  --no_check         do not read the result again
  --json             print one JSON object and nothing else

examples:
  taskmoe export runs/quickstart --task all --out runs/quickstart/loras
  taskmoe export runs/quickstart --task reverse --out reverse --format merged
  taskmoe export runs/quickstart --task all --out loras --max_rank 8 --json
"""


def run(tokens: list[str]) -> int:
    """``export RUN --task NAME|all --out DIR [...]``, see ``USAGE``."""
    task, tokens = take_option(tokens, "task")
    out, tokens = take_option(tokens, "out")
    kind, tokens = take_option(tokens, "format")
    rank, tokens = take_option(tokens, "max_rank")
    average, tokens = take_switch(tokens, "average")
    force, tokens = take_switch(tokens, "force")
    no_check, tokens = take_switch(tokens, "no_check")
    as_json, tokens = take_switch(tokens, "json")
    (path,) = folders(tokens, "export", "RUN", most=1)
    if task is None or out is None:
        raise UsageError(f"export: --{'out' if task else 'task'} is missing; see taskmoe export --help")
    if kind is not None and kind not in FORMATS:
        near = difflib.get_close_matches(kind, FORMATS, n=1, cutoff=0.0)[0]
        raise UsageError(f"--format: {kind!r} is not one of {', '.join(FORMATS)}; the nearest is {near!r}")
    if rank is not None and not (rank.isdigit() and int(rank)):
        raise UsageError(f"--max_rank: {rank!r} is not a whole number, at least 1")
    from taskmoe.train.export_view import export

    return export(
        path,
        task,
        out,
        kind or FORMATS[0],
        as_json,
        max_rank=None if rank is None else int(rank),
        average=average,
        force=force,
        check=not no_check,
    )
