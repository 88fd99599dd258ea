"""Which values settings may have, and which settings need or exclude each other. Types are checked before."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from taskmoe.moe.config import COMPOSE, NEW_ROWS, SCOPES
from taskmoe.train import deepspeed_config
from taskmoe.train.config import SURGERY_SCOPES, SURGERY_WAYS, Config, MixingConfig, PhaseConfig
from taskmoe.train.config_decode import Decoder, leaves
from taskmoe.train.config_idle import absent_groups, ineffective
from taskmoe.train.config_methods import check_balancing, check_moe, check_moe_names, check_surgery
from taskmoe.train.mixing import MIXTURES
from taskmoe.train.schedule import GROUPS, REINIT, SCHEDULES, TEMPERATURES, resolve_phases

FORMATS = (
    "auto",
    "text_label",
    "input_output",
    "instruction",
    "prompt_completion",
    "messages",
    "conversations",
    "pairs",
)

# Key -> its values. `*` stands for the index of a list.
CHOICES: dict[str, Collection[str]] = {
    "tokenizer.kind": ("bpe", "wordlevel", "char"),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
    "contrastive.similarity": ("cosine", "dot"),
    "pooling": ("model", "mean"),
    "moe.compose": COMPOSE,
    "moe.router_scope": SCOPES,
    "moe.new_task_rows": NEW_ROWS,
    "datasets.*.format": FORMATS,
    "data.on_bad_row": ("error", "skip"),
    "data.on_long_row": ("error", "skip", "truncate"),
    "mixing.strategy": MIXTURES,
    "phases.*.mixing.strategy": MIXTURES,
    "phases.*.train": GROUPS,
    "phases.*.reinit": REINIT,
    "phases.*.router_temperature_schedule": TEMPERATURES,
    "optim": ("adamw_torch", "sgd"),
    "lr_scheduler_type": SCHEDULES,
    "loss_reduction": ("token", "task", "sample"),
    "surgery.scope": SURGERY_SCOPES,
    "surgery.way": SURGERY_WAYS,
    "eval_split": ("train", "validation", "test"),
    "metric_for_best_model": ("score", "loss"),
    "report_to": ("wandb", "none"),
    "track.detail": ("brief", "detailed"),
}

# Key -> (lowest, highest, what is asked for). A bound that is excluded is written in the last column.
_COUNT = (1, math.inf, "a whole number >= 1")
_NOT_NEGATIVE = (0, math.inf, "a number >= 0")
_POSITIVE = (math.ulp(0.0), math.inf, "a number > 0")
_SHARE = (0, 1, "a number between 0 and 1")
_SHARE_BELOW_1 = (0, math.nextafter(1, 0), "a number >= 0 and < 1")
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            "tokenizer.vocab_size",
            *(f"moe.{k}" for k in ("r", "num_experts", "num_heads", "top_k", "task_embedding_dim")),
            "moe.router_hidden_dim",
            *(f"data.skill_gym.{k}" for k in ("num_tasks", "num_skills", "skills_per_task", "alphabet_size")),
            *(f"data.skill_gym.{k}" for k in ("max_string_length", "min_string_length", "train_rows")),
            *(f"data.{k}" for k in ("max_length", "max_target_length", "group_by_length_window")),
            "data.max_rows_per_task",
            "datasets.*.max_rows",
            "mixing.cap",
            "phases.*.mixing.cap",
            "phases.*.steps",
            *(f"evaluation.{k}" for k in ("max_rows", "max_new_tokens", "num_beams")),
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
            *("early_stopping_patience", "track.media_steps", "track.max_keys"),
            *(f"surgery.{k}" for k in ("refresh_every", "max_tasks", "matrix_steps")),
            "balancing.validation_rows",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            *("seed", "data.skill_gym.seed", "data.skill_gym.unseen_tasks", "track.per_task_keys"),
            *("data.skill_gym.validation_rows", "data.skill_gym.test_rows", "datasets.*.weight"),
            *("moe.router_init_std", "weight_decay", "max_grad_norm", "warmup_steps", "max_steps"),
            *("learning_rate", "router_learning_rate", "task_embedding_learning_rate", "base_learning_rate"),
            *(f"phases.*.{g}learning_rate" for g in ("", "router_", "task_embedding_", "base_")),
            *("task_weights.*", "mixing.weights.*", "phases.*.mixing.weights.*"),
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            *("moe.lora_alpha", "moe.router_temperature", "adam_epsilon", "phases.*.router_temperature"),
            *("mixing.temperature", "mixing.max_epochs", "moe.rank_pattern.*"),
            "moe.expert_pattern.*",
            *("phases.*.mixing.temperature", "phases.*.mixing.max_epochs", "contrastive.temperature"),
        ),
        _POSITIVE,
    ),
    "warmup_ratio": _SHARE,
    **dict.fromkeys(
        ("moe.lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"), _SHARE_BELOW_1
    ),
}


def validate(config: Config, explicit: Mapping[str, str] | None = None) -> None:
    """Check choices, ranges, what needs or excludes what, and keys without effect.

    Args:
        explicit: {dotted path: where it was written} of the keys set; None: those not at their default.

    Raises:
        ConfigError: the first key at fault, the value found and what to do.
    """
    check = Decoder(dict(explicit or {}))
    check_moe_names(config, check)
    for path, value, _ in leaves(config):
        _check_choice(check, path, value)
        _check_range(check, path, value)
    _check_combinations(config, check)
    idle = ineffective(config)
    for path, value, default in leaves(config):
        is_set = value != default if explicit is None else _was_set(path, explicit)
        reason = next((idle[p] for p in _prefixes(path) if p in idle), None)
        # Off is no wish: it may stand where it has no effect.
        if is_set and reason and value is not None and value is not False:
            raise check.fail(path, f"has no effect: {reason}; remove it, or add --{path} null")
    resolve_phases(config)
    _check_groups(config, check)
    if config.deepspeed is not None:
        deepspeed_config.read(config.deepspeed)
    check_moe(config, check)
    check_balancing(config, check)
    check_surgery(config, check)


def choices(path: str) -> Collection[str] | None:
    """The values a key may have, where they are a list of names.

    Those of routers, gates, balancing and surgery are read from their registries, which imports torch.
    """
    if path in ("moe.bank", "moe.router", "moe.representation", "moe.gate", "phases.*.gate"):
        from taskmoe.moe.choices import SEAMS

        return SEAMS[path.rpartition(".")[2]]
    if path == "balancing.method":
        from taskmoe.train.balancing.balancer import BALANCERS

        return BALANCERS
    if path == "surgery.method":
        from taskmoe.train.surgery.combine import METHODS
        from taskmoe.train.surgery.direct import DIRECT

        return (*METHODS, *DIRECT)
    return CHOICES.get(_pattern(path))


def _check_choice(check: Decoder, path: str, value: Any) -> None:
    allowed = CHOICES.get(_pattern(path))
    for item in value if isinstance(value, tuple) else (value,):
        if allowed is not None and item not in allowed:
            near = difflib.get_close_matches(str(item), allowed, n=1, cutoff=0.0)[0]
            raise check.fail(path, f"{item!r} is not one of {', '.join(allowed)}; the nearest is {near!r}")


def _check_range(check: Decoder, path: str, value: Any) -> None:
    items = value.items() if isinstance(value, dict) else [("", value)]
    for key, item in items:
        here = f"{path}.{key}" if key else path
        bounds = RANGES.get(f"{_pattern(path)}.*" if key else _pattern(path))
        for number in item if isinstance(item, tuple) else (item,):
            if bounds is not None and number is not None and not bounds[0] <= number <= bounds[1]:
                raise check.fail(here, f"{number} is out of range; give {bounds[2]}")


def _check_combinations(config: Config, check: Decoder) -> None:
    data = config.data
    if (config.model is None) == (config.model_name_or_path is None):
        found = "neither is" if config.model is None else "both are"
        raise check.fail(
            "model" if config.model is not None else "model_name_or_path",
            f"{found} set of model_name_or_path and model; give exactly one "
            "(a folder or hub name, or a config such as {type: llama, hidden_size: 64})",
        )
    if config.model is not None and not isinstance(config.model.get("type"), str):
        raise check.fail("model.type", "is missing; name the kind of model, such as llama, gpt2, t5 or bert")
    if not config.datasets and data.root is None and data.skill_gym is None:
        raise check.fail("datasets", "there are no data; set datasets, data.root or data.skill_gym")
    for i, entry in enumerate(config.datasets):
        if not entry.path:
            raise check.fail(f"datasets.{i}.path", "is missing; give a file, a folder or a name on the hub")
    if config.moe.new_task_rows == "nearest" and config.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        message = "'nearest' compares losses under the routes of other tasks; set it to mean"
        raise check.fail("moe.new_task_rows", f"{message} with task_type {config.task_type}")
    if data.packing and config.task_type != "CAUSAL_LM":
        raise check.fail("data.packing", f"only task_type CAUSAL_LM can be packed, not {config.task_type}")
    if config.warmup_steps is not None and config.warmup_steps > config.max_steps:
        raise check.fail("warmup_steps", f"{config.warmup_steps} is more than max_steps, {config.max_steps}")
    if "none" in config.report_to and len(config.report_to) > 1:
        raise check.fail("report_to", "'none' stands beside others; leave it out or alone")
    if not config.phases:
        raise check.fail("phases", "the list is empty; leave the key out for a run of one phase")
    for here, mixing in _mixings(config):
        _check_mixing(here, mixing, config, check)


def _check_mixing(here: str, mixing: MixingConfig, config: Config, check: Decoder) -> None:
    if mixing.strategy == "capped" and mixing.cap is None:
        raise check.fail(f"{here}.cap", f"is missing; {here}.strategy 'capped' needs a number of examples")
    if mixing.strategy != "explicit" or mixing.weights:
        return
    weighted = [i for i, entry in enumerate(config.datasets) if entry.weight is not None]
    if not weighted:
        raise check.fail(
            f"{here}.weights",
            f"is missing; {here}.strategy 'explicit' needs it, or a weight for each of datasets",
        )
    for i in weighted:
        if config.datasets[i].name is None:
            raise check.fail(f"datasets.{i}.weight", f"needs datasets.{i}.name: a weight belongs to a task")


def _check_groups(config: Config, check: Decoder) -> None:
    """Groups that a phase names, other than by default, must be there; and one at least must train."""
    absent = absent_groups(config)
    for i, phase in enumerate(config.phases):
        for key in ("train", "reinit"):
            named, path = getattr(phase, key), f"phases.{i}.{key}"
            idle = [group for group in named if group in absent]
            if idle and named != getattr(PhaseConfig, key):
                raise check.fail(path, f"{idle[0]!r} has no effect: {absent[idle[0]]}; leave it out")
        if config.max_steps and absent.keys() >= set(phase.train):
            reason = next(absent[group] for group in phase.train)
            raise check.fail(f"phases.{i}.train", f"nothing trains in this phase: {reason}; name base, say")


def _mixings(config: Config) -> Iterator[tuple[str, MixingConfig]]:
    if any(phase.mixing is None for phase in config.phases):
        yield "mixing", config.mixing
    for i, phase in enumerate(config.phases):
        if phase.mixing is not None:
            yield f"phases.{i}.mixing", phase.mixing


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _was_set(path: str, explicit: Mapping[str, str]) -> bool:
    return path in explicit or any(p.startswith(path + ".") for p in explicit)
