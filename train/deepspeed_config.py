"""A DeepSpeed JSON with its "auto" values filled in from the run's settings.

The engine is told one thing that is not so: that gradients are not accumulated. The loop does that itself
(it weighs the parts of a step by their tokens), and an engine told of it counts every ``step()`` as a part.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from taskmoe.train.config import Config, ConfigError

# Elements; DeepSpeed's own 5e8 sets aside 2 GB a rank for gradients that are a few million numbers here.
BUCKET = 10_000_000
# Tensors below this stay whole on every rank under ZeRO-3: routers, which run every step, and norms.
PERSISTENCE = 100_000

AUTO_ZERO = {
    "reduce_bucket_size": BUCKET,
    "allgather_bucket_size": BUCKET,
    "stage3_prefetch_bucket_size": BUCKET,
    "stage3_param_persistence_threshold": PERSISTENCE,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
    "overlap_comm": False,
    "contiguous_gradients": True,
}
REFUSED = {
    "optimizer": "choose the optimiser with `optim: adamw_torch` or `optim: sgd` in the YAML",
    "scheduler": "choose the schedule with `lr_scheduler_type` in the YAML",
    "bf16": "write `bf16: true` in the YAML: frozen weights in bf16, what trains in fp32",
    "fp16": "write `bf16: true` in the YAML; fp16 is not supported",
    "amp": "write `bf16: true` in the YAML",
    "torch_autocast": "write `bf16: true` in the YAML",
}


def read(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON as it stands in the file, without the sections that are switched off.

    Raises:
        ConfigError: the file is missing, is not JSON, is not an object, or has a section whose job the YAML
            does (optimizer, scheduler, bf16, fp16).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        siblings = [str(p) for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), siblings, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else "; configs/deepspeed/ has one for each stage"
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"deepspeed: cannot read {path} ({reason}){hint}") from error
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"deepspeed: {path}:{error.lineno}:{error.colno}: not JSON ({error.msg})"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"deepspeed: {path}: expected a JSON object, found {type(raw).__name__}")
    _refuse(raw, f"deepspeed: {path}")
    return {key: value for key, value in raw.items() if key not in REFUSED}


def build(config: Config, world_size: int, path: str | Path | None = None) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    Args:
        config: batch size, accumulation and clipping come from here.
        world_size: number of ranks.
        path: a DeepSpeed JSON; None: ZeRO 0.

    Raises:
        ConfigError: as :func:`read`, a number that contradicts the YAML, or an "auto" that has no value here.
    """
    raw = {} if path is None else read(path)
    where = "deepspeed" if path is None else f"deepspeed: {path}"
    micro = config.per_device_train_batch_size
    accumulation = config.gradient_accumulation_steps
    _agree(where, raw, "train_micro_batch_size_per_gpu", micro, f"per_device_train_batch_size: {micro}")
    _agree(
        where,
        raw,
        "gradient_accumulation_steps",
        accumulation,
        f"gradient_accumulation_steps: {accumulation}",
    )
    _agree(
        where,
        raw,
        "train_batch_size",
        micro * world_size * accumulation,
        f"{micro} sequences x {world_size} ranks x {accumulation} accumulated",
    )
    _agree(where, raw, "gradient_clipping", config.max_grad_norm, f"max_grad_norm: {config.max_grad_norm}")

    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{where}: zero_optimization: expected an object, found {type(zero).__name__}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{where}: zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3")
    zero = {key: AUTO_ZERO.get(key, value) if value == "auto" else value for key, value in zero.items()}

    filled = {
        "steps_per_print": 1_000_000_000,  # the loop speaks for itself
        "wall_clock_breakdown": False,
        **raw,
        "zero_optimization": {**zero, "stage": stage},
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(config.max_grad_norm),  # always: DeepSpeed's default is 1.0, not 0
        "zero_allow_untested_optimizer": True,
    }
    if "offload_optimizer" in zero:
        filled.setdefault("zero_force_ds_cpu_optimizer", False)  # ours is torch's
    _no_auto_left(filled, where, "")
    return filled


def _refuse(raw: dict[str, Any], where: str) -> None:
    for section, remedy in REFUSED.items():
        found = raw.get(section)
        if found is None:
            continue
        switch = found.get("enabled", False) if isinstance(found, dict) else found
        # Files written for other trainers carry {"enabled": "auto"}: that means what the YAML says.
        if section in ("optimizer", "scheduler") or switch not in (False, "auto"):
            raise ConfigError(f"{where}: {section}: this section is not used here; remove it and {remedy}")


def _agree(where: str, raw: dict[str, Any], key: str, value: float, source: str) -> None:
    """A number in the JSON must be the YAML's: two places that disagree are an error, not a choice."""
    found = raw.get(key, "auto")
    if found != "auto" and found != value:
        raise ConfigError(f'{where}: {key}: {found!r} is not {value} ({source}); write "auto"')


def _no_auto_left(value: Any, where: str, path: str) -> None:
    if value == "auto":
        raise ConfigError(f'{where}: {path}: "auto" has no value here; write a number or remove the key')
    if isinstance(value, dict):
        for key, item in value.items():
            _no_auto_left(item, where, f"{path}.{key}" if path else key)
