"""Prompts of a saved adapter of ``bank: prompt``, for models that learn or start from them.

Legend: T tasks, l positions of a prompt, W numbers a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from taskmoe.moe.config import ConfigError

PREFIX = "prompts.bank."


def read_prompts(folder: str | Path, tasks: Sequence[str] | None, key: str) -> tuple[Tensor, Tensor]:
    """The prompts of ``tasks`` (None: of all), [T, l, W], and P_0, from which all of them started, [l, W].

    Args:
        key: of the setting that names the folder, for messages.

    Raises:
        ConfigError: no such adapter, or none with a prompt for one of the tasks.
    """
    from safetensors import safe_open

    from taskmoe.moe.state import TASKS, WEIGHTS
    from taskmoe.moe.tasks import TaskTable

    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{key}: {folder} holds no {WEIGHTS}; give the folder of a saved adapter (checkpoint-N of a run)"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {}
        for name in ("prompts_TlW", "start_lW"):
            if PREFIX + name not in file.keys():  # noqa: SIM118 (a file, not a dict)
                raise ConfigError(f"{key}: {folder} is no adapter of bank: prompt (it lacks {PREFIX + name})")
            found[name] = file.get_tensor(PREFIX + name)
    known = TaskTable.load(folder / TASKS)
    wanted = known.names if tasks is None else tasks
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ConfigError(f"{key}: {folder} has no prompt for {', '.join(missing)}; train one first")
    return found["prompts_TlW"][[known.id(name) for name in wanted]], found["start_lW"]
