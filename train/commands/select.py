"""``taskmoe select``: which tasks to train on, or to transfer from."""

from __future__ import annotations

from pathlib import Path

from taskmoe.train.command_line import UsageError, positional, take_option, take_switch
from taskmoe.train.folders import nearest_folder

USAGE = """\
usage: taskmoe select RUN|CFG.yaml --method M[,M...] [--target TASK|all] [--matrix FILE] [--group K]
                      [--rows N] [--encoder E] [--answers] [--measure M] [--key value ...] [--json]

Rank the tasks that a target may learn from, or group tasks that may be trained together. CFG.yaml says what
the tasks and the model would be, before anything trains; of a run, the base is read as the run left it.

  --method M     semb: mean sentence embeddings; textemb: the model's mean last states; taskemb: diagonal of
                 the Fisher information; gradient: cosine of the tasks' gradients; divergence: between clouds
                 of embeddings; consistency_diversity: near the target, and covering it together; routing: of
                 a run, who shares experts; datamap: of a run with several checkpoints, who is learned alike;
                 size, random: what any of them should beat
  --target TASK  whose sources are ranked; all: each task in turn
  --matrix FILE  measured transfer, {"target": {"source": score}}, the more the better: Regret@1, Regret@3 and
                 NDCG of each method, means over the targets
  --group K      at most K groups, with the share that a task has in each (not by consistency_diversity, size
                 and random)
  --rows N       of each task, the first N training rows are read (default 100)
  --encoder E    of semb, divergence, consistency_diversity: hashed_words (default: counts of words), base
                 (the model itself), or a sentence encoder by path or name
  --answers      texts are prompts with their answers; default: prompts alone
  --measure M    of divergence: mmd (default), wasserstein, kl
  --json         print one JSON object and nothing else

examples:
  taskmoe select configs/quickstart.yaml --target all --method textemb,gradient,size --rows 20
  taskmoe select runs/quickstart --method routing --group 4
  taskmoe select runs/quickstart --target all --method routing,gradient,random --matrix transfer.json --json
"""


def run(tokens: list[str]) -> int:
    """``select RUN|CFG.yaml --method M [...]``, see ``USAGE``."""
    method, tokens = take_option(tokens, "method")
    target, tokens = take_option(tokens, "target")
    matrix, tokens = take_option(tokens, "matrix")
    count, tokens = take_option(tokens, "group")
    rows, tokens = take_option(tokens, "rows")
    encoder, tokens = take_option(tokens, "encoder")
    measure, tokens = take_option(tokens, "measure")
    answers, tokens = take_switch(tokens, "answers")
    as_json, tokens = take_switch(tokens, "json")
    path, overrides = positional(tokens, "select", "RUN|CFG.yaml")
    if method is None:
        raise UsageError("select: --method is missing; see taskmoe select --help")
    if target is None and count is None:
        raise UsageError("select: give --target TASK to rank its sources, --group K to group tasks, or both")
    for option, number in (("group", count), ("rows", rows)):
        if number is not None and not (number.isdigit() and int(number)):
            raise UsageError(f"--{option}: {number!r} is not a whole number, at least 1")
    if not Path(path).exists():
        raise UsageError(f"{path}: no such run folder or file{nearest_folder(Path(path))}")
    from taskmoe.train.selection.base import Options
    from taskmoe.train.selection.view import show

    given = {"encoder": encoder, "measure": measure, "rows": None if rows is None else int(rows)}
    options = Options(answers=answers, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    methods = [name.strip() for name in method.split(",")]
    groups = None if count is None else int(count)
    return show(
        path, overrides, methods, as_json, target=target, count=groups, matrix=matrix, options=options
    )
