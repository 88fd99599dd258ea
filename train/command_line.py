"""Reading a command line, for all commands. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path


class UsageError(ValueError):
    """A command line that cannot be understood."""


def positional(tokens: list[str], command: str, what: str) -> tuple[str, list[str]]:
    """The one token that is no setting, and the settings as ``--key=value``."""
    if not tokens:
        raise UsageError(f"{command}: {what} is missing; see taskmoe {command} --help")
    from taskmoe.train.config_overrides import split

    pairs, rest = split(tokens)
    if len(rest) != 1:
        found = f"unexpected argument {rest[1]!r}" if rest else f"{what} is missing"
        raise UsageError(f"{command}: {found}; see taskmoe {command} --help")
    return rest[0], [f"--{key}={value}" for key, value in pairs]


def take_option(tokens: list[str], *names: str) -> tuple[str | None, list[str]]:
    """The value of an option that is no setting, wherever it stands, and the tokens without it."""
    value, rest, i = None, [], 0
    while i < len(tokens):
        option, equals, after = tokens[i].partition("=")
        i += 1
        if option not in [f"--{name}" for name in names]:
            rest.append(tokens[i - 1])
        elif equals:
            value = after
        elif i < len(tokens) and not tokens[i].startswith("--"):
            value = tokens[i]
            i += 1
        else:
            raise UsageError(f"{option}: a value is missing")
    return value, rest


def take_switch(tokens: list[str], name: str) -> tuple[bool, list[str]]:
    """Whether a switch is given, and the tokens without it."""
    return f"--{name}" in tokens, [token for token in tokens if token != f"--{name}"]


def take_policy(tokens: list[str]) -> tuple[str, list[str]]:
    """``--unknown_task``: what becomes of tasks that a run does not know; ``train/adapt/unknown.py``."""
    policy, tokens = take_option(tokens, "unknown_task")
    if policy not in (None, "error", "average", "nearest"):
        raise UsageError(f"--unknown_task: {policy!r} is not one of error, average, nearest")
    return policy or "error", tokens


def folders(
    tokens: list[str], command: str, what: str, fewest: int = 1, most: int | None = None
) -> list[str]:
    """All tokens, of a command that takes folders and no settings."""
    wrong = [token for token in tokens if token.startswith("--")] or tokens[most or len(tokens) :]
    if len(tokens) < fewest or wrong:
        missing = f"{what} are needed, not {tokens[0]!r} alone" if tokens else f"{what} is missing"
        found = f"unexpected argument {wrong[0]!r}" if wrong else missing
        raise UsageError(f"{command}: {found}; see taskmoe {command} --help")
    return tokens


def check_writable(option: str, path: str | None) -> None:
    """Before anything is computed: whether a file can be written there."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        what = "is a folder" if Path(path).is_dir() else "lies in a folder that does not exist"
        raise UsageError(f"--{option}: {path} {what}; give the path of a file")
