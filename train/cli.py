"""The command line. Anything a user can get wrong ends in one line on stderr and exit code 2.

Nothing heavy is imported before a command needs it: ``--help`` and a mistyped command answer at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from taskmoe.train.command_line import (
    UsageError,
    check_writable,
    folders,
    positional,
    take_option,
    take_policy,
    take_switch,
)
from taskmoe.train.commands import adapt, export, merge, predict, select
from taskmoe.train.folders import nearest_folder
from taskmoe.train.usage import USAGE

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An error whose class is defined in taskmoe is a message to the user; any other is a bug and keeps its
    traceback.
    """
    local_rank, tokens = take_option(list(sys.argv[1:] if argv is None else argv), "local_rank", "local-rank")
    is_main = os.environ.get("RANK", local_rank or "0") == "0"
    try:
        return _run(tokens)
    except KeyboardInterrupt:
        _say("interrupted", is_main)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `taskmoe config cfg.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if type(error).__module__.split(".")[0] != "taskmoe" and not isinstance(error, UsageError):
            raise
        _say(f"error: {' '.join(str(error).split())}", is_main)
        return EXIT_USER_ERROR if isinstance(error, ValueError) else 1


def _run(tokens: list[str]) -> int:
    if not tokens:
        raise UsageError(f"no command; give one of {', '.join(COMMANDS)}, or --help")
    name, rest = tokens[0], tokens[1:]
    if name in ("-h", "--help", "help"):
        print(USAGE[""], end="")
        return 0
    if name == "--version":
        print(f"taskmoe {version('taskmoe')}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown command {name!r}; the nearest of {', '.join(COMMANDS)} is {near!r}")
    if any(token in ("-h", "--help") for token in rest):
        print(USAGE[name], end="")
        return 0
    return COMMANDS[name](rest)


def train(tokens: list[str]) -> int:
    """``train CFG.yaml [--key value ...] [--num_ranks N]``"""
    num_ranks, tokens = take_option(tokens, "num_ranks")
    path, overrides = positional(tokens, "train", "CFG.yaml")
    from taskmoe.train.config_io import load

    config = load(path, overrides)
    if num_ranks is not None:
        if not num_ranks.isdigit() or int(num_ranks) < 1:
            raise UsageError(f"--num_ranks: {num_ranks!r} is not a number of processes >= 1")
        if "RANK" in os.environ and "LOCAL_RANK" in os.environ:
            raise UsageError(
                "--num_ranks: a launcher has started this process already; give the number to it"
            )
        if int(num_ranks) > 1:
            from taskmoe.train.launch import launch_ranks

            return launch_ranks(int(num_ranks), ["train", path, *overrides])
    from taskmoe.train.loop import train as run

    return run(config)


def evaluate(tokens: list[str]) -> int:
    """``eval RUN [--split SPLIT] [--data DIR] [--baseline RUN2] [--unknown_task POLICY]
    [--key value ...] [--json]``"""
    split, tokens = take_option(tokens, "split")
    baseline, tokens = take_option(tokens, "baseline")
    root, tokens = take_option(tokens, "data")
    unknown, tokens = take_policy(tokens)
    as_json, tokens = take_switch(tokens, "json")
    run, overrides = positional(tokens, "eval", "RUN")
    for folder in (run, baseline):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"{folder}: no such run folder{nearest_folder(Path(folder))}")
    if split is not None and split not in ("train", "validation", "test"):
        near = difflib.get_close_matches(split, ("train", "validation", "test"), n=1, cutoff=0.0)[0]
        raise UsageError(f"--split: {split!r} is not one of train, validation, test; the nearest is {near!r}")
    if root is not None:
        overrides.append(f"--data.root={root}")
    from taskmoe.train.run_eval import evaluate_run

    return evaluate_run(run, overrides, split, as_json, baseline, unknown)


def inspect(tokens: list[str]) -> int:
    """``inspect RUN|CHECKPOINT [--layer PATTERN] [--json] [--html OUT]``"""
    layer, tokens = take_option(tokens, "layer")
    html, tokens = take_option(tokens, "html")
    as_json, tokens = take_switch(tokens, "json")
    (path,) = folders(tokens, "inspect", "RUN", most=1)
    check_writable("html", html)
    from taskmoe.train.inspection_view import inspect as show

    return show(path, layer, as_json, html)


def compare(tokens: list[str]) -> int:
    """``compare RUN1 RUN2 ... [--json] [--html OUT] [--markdown OUT]``"""
    html, tokens = take_option(tokens, "html")
    markdown, tokens = take_option(tokens, "markdown")
    as_json, tokens = take_switch(tokens, "json")
    runs = folders(tokens, "compare", "RUN1 RUN2", fewest=2)
    for name, path in (("html", html), ("markdown", markdown)):
        check_writable(name, path)
    from taskmoe.train.comparison_view import compare as show

    return show(runs, as_json, html, markdown)


def config(tokens: list[str]) -> int:
    """``config CFG.yaml [--key value ...]`` or ``config --schema``"""
    if "--schema" in tokens:
        if len(tokens) > 1:
            raise UsageError("--schema takes nothing beside it")
        import json

        from taskmoe.train.config_schema import schema

        print(json.dumps(schema(), indent=2, ensure_ascii=False))
        return 0
    path, overrides = positional(tokens, "config", "CFG.yaml")
    from taskmoe.train.config_io import dump, load

    print(dump(load(path, overrides)), end="")
    return 0


def tune(tokens: list[str]) -> int:
    """``tune [--out FILE] [--budget SECONDS]``"""
    out, tokens = take_option(tokens, "out")
    budget, tokens = take_option(tokens, "budget")
    if tokens:
        raise UsageError(f"tune: unexpected argument {tokens[0]!r}; see taskmoe tune --help")
    if budget is not None and not budget.isdigit():
        raise UsageError(f"--budget: {budget!r} is not a whole number of seconds")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("tune: there is no GPU here to measure; without one the kernels are not used")
    from taskmoe.kernels import configs
    from taskmoe.kernels.tune import tune as measure
    from taskmoe.kernels.tune import write

    gpu, path = torch.cuda.get_device_name(), Path(out) if out is not None else configs.override_file()
    major, minor = torch.cuda.get_device_capability()
    lines = measure(gpu, f"sm_{major}{minor}", torch.device("cuda"), float(budget or 600), print)
    write(path, gpu, lines)
    faster = sum(launch is not None for launch in lines.values())
    print(f"{faster} launches of {gpu} written to {path}; {len(lines) - faster} are best as they are")
    return 0


def _say(line: str, is_main: bool) -> None:
    """Rank 0 alone speaks: the others met the same error."""
    if is_main:
        print(f"taskmoe: {line}", file=sys.stderr, flush=True)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict.run,
    "inspect": inspect,
    "compare": compare,
    "adapt": adapt.run,
    "export": export.run,
    "merge": merge.run,
    "select": select.run,
    "config": config,
    "tune": tune,
}

if __name__ == "__main__":
    raise SystemExit(main())
