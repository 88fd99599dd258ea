"""LoRAs as peft saves them: adapter_config.json and adapter_model.safetensors of one folder.

Legend: r rank, K d_in, N d_out.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.moe.peft_write import CONFIG, WEIGHTS

PREFIX = "base_model.model."
# Settings under which a LoRA is more than B A x, and the value that it must have instead.
PLAIN: dict[str, Any] = {
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
}
# Ways to start that take from the base what they put into A and B: peft does so again when it loads them.
BASE_CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Lora:
    """One saved LoRA. factors: {module: (A_rK, B_rN)}; the scale, lora_alpha / r or lora_alpha / sqrt(r), is
    in B.

    A_rK: [r, K], B_rN: [r, N], in the dtype of the file.
    """

    folder: Path
    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        return max(len(A) for A, _ in self.factors.values())


def read_lora(folder: str | Path, key: str) -> Lora:
    """Read a folder that peft wrote.

    Args:
        key: of the setting that names the folder, for messages.

    Raises:
        ConfigError: not readable, not a LoRA, or one with parts beside A and B; names what is in the way.
    """
    folder = Path(folder)
    config = _config(folder, key)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{key}: {folder} holds a {config.get('peft_type')}, not a LORA; leave it out")
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, [], {}):
            raise ConfigError(
                f"{key}: {folder}: {name} is {config[name]!r}, but only A and B can be imported; leave it out"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGES):
        raise ConfigError(
            f"{key}: {folder}: init_lora_weights is {start!r}, which changes the base too; convert it to a "
            "plain LoRA (peft's path_initial_model_for_weight_conversion), or leave it out"
        )
    weights = folder / WEIGHTS
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{key}: {weights}: not a readable safetensors file ({error})") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, factor = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or tensor.dim() != 2:
            raise ConfigError(f"{key}: {weights}: {name} is neither A nor B of a linear; leave it out")
        pairs.setdefault(module, {})[factor] = tensor
    if not pairs:
        raise ConfigError(f"{key}: {weights} is empty; leave the folder out")
    factors = {}
    for module, pair in pairs.items():
        if len(pair) < 2 or len(pair["lora_A"]) != pair["lora_B"].shape[1]:
            raise ConfigError(f"{key}: {weights}: A and B of {module} do not belong together")
        scale = _scale(config, module, len(pair["lora_A"]))
        factors[module] = pair["lora_A"], pair["lora_B"].T * scale
    return Lora(folder, factors)


def _config(folder: Path, key: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path}: not a readable adapter config ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {path}: expected an object, found {type(values).__name__}")
    return values


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """peft's: alpha of the module over its rank, or over the root of it with rank stabilisation."""
    alpha = float(config.get("lora_alpha", 8))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _names(pattern, module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
