"""``taskmoe export``: what one task of a run uses, as files that other programs read."""

from __future__ import annotations

from taskmoe.train.command_line import UsageError, folders, take_option, take_switch

USAGE = """\
usage: taskmoe export RUN --task NAME|all --out DIR [--max_rank N] [--force] [--no_check] [--json]

Write what a task of a run, or of one checkpoint in it, uses as an adapter that peft and vLLM load: exactly,
where routing depends on the task alone. One task goes straight into DIR, all tasks into a folder each. Where
the base was trained too, or built from settings, it is saved beside, in DIR/base.

  --task NAME|all   a task of the run
  --out DIR         a folder that does not exist, or is empty
  --max_rank N      cut LoRAs down to this rank; the error of each layer is printed
  --force           replace what is in DIR
  --no_check        do not load the result again and compare its logits with the run's
  --json            print one JSON object and nothing else

examples:
  taskmoe export runs/quickstart --task all --out runs/quickstart/loras
  taskmoe export runs/quickstart --task reverse --out lora --max_rank 8
"""


def run(tokens: list[str]) -> int:
    """``export RUN --task NAME|all --out DIR [--max_rank N] [--force] [--no_check] [--json]``"""
    task, tokens = take_option(tokens, "task")
    out, tokens = take_option(tokens, "out")
    rank, tokens = take_option(tokens, "max_rank")
    force, tokens = take_switch(tokens, "force")
    no_check, tokens = take_switch(tokens, "no_check")
    as_json, tokens = take_switch(tokens, "json")
    (path,) = folders(tokens, "export", "RUN", most=1)
    for option, value in (("task", task), ("out", out)):
        if value is None:
            raise UsageError(f"export: --{option} is missing; see taskmoe export --help")
    if rank is not None and not (rank.isdigit() and int(rank)):
        raise UsageError(f"--max_rank: {rank!r} is not a whole number, at least 1")
    from taskmoe.train.export_view import export

    assert task is not None and out is not None
    most = None if rank is None else int(rank)
    return export(path, task, out, most, force=force, check=not no_check, as_json=as_json)
