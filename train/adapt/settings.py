"""``new_task.yaml``: which tasks a run adapts to, and how they are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taskmoe.train import config_yaml
from taskmoe.train.config import ConfigError, DatasetConfig
from taskmoe.train.config_decode import Decoder


class AdaptError(ValueError):
    """New tasks that cannot be learned as asked: the message says why, and what can be done."""


@dataclass(frozen=True)
class AdaptSettings:
    """The keys of the file; each may also be given as ``--key value``, but for ``datasets``."""

    datasets: tuple[DatasetConfig, ...] = ()  # as in the config of a run
    root: str | None = None  # one folder a task: train|validation|test.jsonl
    skill_gym_unseen: int = 0  # so many compositions beyond the tasks of the run's own skill gym
    template: str | None = None  # of data sets that have none; None: the run's
    max_steps: int = 200
    per_device_train_batch_size: int = 16  # rows of each task in a step, at most its shots
    learning_rate: float | None = None  # experts, LoRAs, heads; None: the run's
    router_learning_rate: float | None = None  # rows of tasks; None: the run's, or 10 x a learning_rate given
    validation: float = 0.25  # share of the shots that is not learned from, but says when to stop; 0: none
    eval_steps: int = 10
    early_stopping_patience: int = 5  # looks at the validation rows without a better loss
    r: int | None = None  # mode: new_lora; None: the run's, times its experts
    encoder: str = "hashed_words"  # mode: retrieve; or an encoder of texts by path or name
    max_eval_rows: int | None = None  # of each task, evenly spread; None: all


def read_settings(path: str | Path, given: Mapping[str, str]) -> AdaptSettings:
    """The settings of a file, with those of a command line on top: {key: text}.

    Raises:
        ConfigError: an unknown key, a value of another type or out of range, no data.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; give a YAML file with datasets:, as in the config of a run")
    tree, origins = config_yaml.read(path)
    for key, text in given.items():
        tree[key] = config_yaml.parse(text, f"--{key}", origins)
        origins[key] = f"--{key}"
    settings: AdaptSettings = Decoder(origins).decode(AdaptSettings, tree, "")
    if not settings.datasets and settings.root is None and not settings.skill_gym_unseen:
        raise ConfigError(f"{path}: no data; set datasets, root or skill_gym_unseen")
    lowest = {
        "skill_gym_unseen": 0, "max_steps": 1, "per_device_train_batch_size": 1, "validation": 0,
        "eval_steps": 1, "early_stopping_patience": 1, "r": 1, "max_eval_rows": 1,
    }  # fmt: skip
    for key, low in lowest.items():
        value = getattr(settings, key)
        if value is not None and (value < low or (key == "validation" and value >= 1)):
            high = " and less than 1" if key == "validation" else ""
            raise ConfigError(f"{origins.get(key, path)}: {key}: {value} must be at least {low}{high}")
    for key in ("learning_rate", "router_learning_rate"):
        value = getattr(settings, key)
        if value is not None and value <= 0:
            raise ConfigError(f"{origins.get(key, path)}: {key}: {value} must be more than 0")
    return settings
