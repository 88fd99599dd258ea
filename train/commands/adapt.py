"""``taskmoe adapt``: what a run makes of tasks that it has not seen, with a few rows of each."""

from __future__ import annotations

from taskmoe.train.command_line import UsageError, folders, take_option, take_switch

MODES = ("router", "router+experts", "mean", "new_lora", "nearest", "retrieve", "zero")
SETTINGS = (
    "root", "skill_gym_unseen", "template", "max_steps", "per_device_train_batch_size", "learning_rate",
    "router_learning_rate", "validation", "eval_steps", "early_stopping_patience", "r", "encoder",
    "max_eval_rows",
)  # fmt: skip
USAGE = """\
usage: taskmoe adapt RUN NEW_TASK.yaml --mode MODE[,MODE...]|all [--shots N[,N...]] [--seeds N[,N...]]
                     [--out DIR] [--baseline MODE] [--force] [--json] [--key value ...]

Learn new tasks from a few rows each, in a trained run or one checkpoint of it, and score them. NEW_TASK.yaml
has datasets: as in the config of a run; several tasks are learned in one call, each as if it were alone.
docs/ADAPT.md says more.

  --mode router          what belongs to the task alone: its rows of the routers (MHR-z)
  --mode router+experts  that, and all experts and routers: the other tasks change, too
  --mode mean            a LoRA that begins as the mean of the experts (MHR-mu)
  --mode new_lora        a LoRA on the base alone: what the run's experts are to beat
  --mode nearest         nothing is learned: the known task whose routes cost the shots least
  --mode retrieve        nothing is learned: the known task whose texts are like the shots (ELM)
  --mode zero            nothing is learned or read: the run's rule for new tasks
  --shots N,N            rows of each task that are read; default: all training rows
  --seeds N,N            which rows, their order, and what is drawn; default: 0
  --out DIR              save each result as the folder of a run
  --baseline MODE        one of the modes: differences and relative gains are against it
  --force                replace what an earlier call left in DIR
  --json                 print one JSON object and nothing else
  --key value            a key of NEW_TASK.yaml: max_steps, learning_rate, router_learning_rate, validation,
                         eval_steps, early_stopping_patience, r, root, skill_gym_unseen, encoder, ...

examples:
  taskmoe adapt runs/poly new_task.yaml --mode router --shots 16 --out runs/poly_sum
  taskmoe adapt runs/poly new_task.yaml --mode all --shots 16,64 --seeds 0,1,2 --baseline new_lora
"""


def run(tokens: list[str]) -> int:
    """``adapt RUN NEW_TASK.yaml --mode MODE [...]``, see ``USAGE``."""
    mode, tokens = take_option(tokens, "mode")
    shots, tokens = take_option(tokens, "shots")
    seeds, tokens = take_option(tokens, "seeds")
    out, tokens = take_option(tokens, "out")
    baseline, tokens = take_option(tokens, "baseline")
    force, tokens = take_switch(tokens, "force")
    as_json, tokens = take_switch(tokens, "json")
    given = {}
    for key in SETTINGS:
        value, tokens = take_option(tokens, key)
        if value is not None:
            given[key] = value
    path, file = folders(tokens, "adapt", "RUN NEW_TASK.yaml", fewest=2, most=2)
    if mode is None:
        raise UsageError(f"adapt: --mode is missing; give one or more of {', '.join(MODES)}, or all")
    modes = MODES if mode == "all" else tuple(dict.fromkeys(mode.split(",")))
    for name in modes:
        if name not in MODES:
            raise UsageError(f"--mode: {name!r} is not one of {', '.join(MODES)}, or all")
    if baseline is not None and baseline not in modes:
        raise UsageError(f"--baseline: {baseline!r} is not among the modes {', '.join(modes)}")
    numbers = [None] if shots is None else _numbers("shots", shots, 1)
    drawn = _numbers("seeds", seeds or "0", 0)
    from taskmoe.train.adapt.settings import read_settings
    from taskmoe.train.adapt.view import show

    settings = read_settings(file, given)
    return show(path, settings, modes, numbers, drawn, out, baseline, force, as_json)


def _numbers(option: str, text: str, least: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= least for part in parts):
        raise UsageError(f"--{option}: {text!r} is not a list of whole numbers, at least {least}, as 1,2,3")
    return list(dict.fromkeys(int(part) for part in parts))
