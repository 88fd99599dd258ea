"""LoRAs that were trained elsewhere as experts: read from peft's folders, frozen, mixed by any router.

Legend: E experts, r the largest rank, K d_in, N d_out.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from taskmoe.moe.banks.base import Placement
from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.banks.on_linears import OnLinears
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.peft_files import Lora, read_lora
from taskmoe.moe.peft_write import CONFIG
from taskmoe.moe.targets import features
from taskmoe.moe.tasks import TaskTable

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel

KEY = "moe.bank_options.adapters"


class Imported:
    """Expert e is the LoRA of the e-th folder: y + sum_e g_e scale_e B_e A_e x.

    Ranks are padded with zeros to the largest, scales are folded into B. A module that one LoRA targets and
    another does not has zeros for the second. The experts are a ``low_rank`` bank: a saved adapter says so
    and needs the folders no more.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts", "lora_dropout", "compose", "num_heads")
    levels: ClassVar[tuple[str, ...]] = LowRankBank.levels
    by_expert: ClassVar[tuple[str, ...]] = LowRankBank.by_expert

    @dataclass(frozen=True)
    class Options:
        adapters: str | tuple[str, ...] = ()  # peft's folders, one an expert; their folder; or a pattern (*)
        train: bool = False  # whether the experts go on training

    @classmethod
    def check(cls, config: TaskMoEConfig, options: Options) -> None:
        """See ``moe/choices.py``; a folder, or a pattern, is looked into when the experts are placed.

        Raises:
            ConfigError: no folders, or another number of them than of experts; as of bank ``low_rank``.
        """
        if not isinstance(options.adapters, str) or not options.adapters:
            _check_count(options.adapters, config.num_experts)
        OnLinears(LowRankBank).check(config, None)

    @staticmethod
    def trains(options: Options) -> bool:
        """See ``moe/choices.py``."""
        return options.train

    @classmethod
    def place(
        cls,
        model: nn.Module,
        config: TaskMoEConfig,
        table: TaskTable,
        *,
        example_inputs: Mapping[str, Any] | None = None,
        dry_run: bool = True,
    ) -> Placement:
        """See :class:`taskmoe.moe.banks.base.BankKind`.

        Raises:
            ConfigError: a folder that cannot be used, modules or sizes that the model does not have, another
                number of experts.
        """
        options = options_of("bank", config, cls)
        loras = _read(options.adapters, config.num_experts)
        _check(model, loras)
        placed = OnLinears(LowRankBank).place(
            model, _as_low_rank(config, loras), table, example_inputs=example_inputs, dry_run=dry_run
        )
        for name, linear in placed.replaced.items():
            _fill(linear.bank, name, loras)  # type: ignore[arg-type]
            linear.bank.frozen = not options.train  # type: ignore[union-attr]
            if linear.token_routing is not None:
                linear.token_routing.router.begin(linear.bank)  # type: ignore[union-attr,operator]
        return placed

    @classmethod
    def prepare(cls, attached: TaskMoEModel) -> None:
        """The model's config describes the bank without the folders."""
        config = attached.moe_config
        options = options_of("bank", config, cls)
        attached.moe_config = _as_low_rank(config, _read(options.adapters, config.num_experts))


def _read(adapters: str | Sequence[str], num_experts: int) -> list[Lora]:
    folders = _inside(adapters) if isinstance(adapters, str) else adapters
    _check_count(folders, num_experts)
    return [read_lora(folder, KEY) for folder in folders]


def _check_count(folders: Sequence[str], num_experts: int) -> None:
    if not folders:
        raise ConfigError(f"{KEY}: is empty; name the folders that peft wrote")
    if len(folders) != num_experts:
        raise ConfigError(f"moe.num_experts: {num_experts}, but {KEY} names {len(folders)}; give that")


def _inside(adapters: str) -> list[str]:
    """The folders with an adapter in a folder, or those that match a pattern, in the order of their names.

    Raises:
        ConfigError: there are none.
    """
    path = Path(adapters).expanduser()
    if (path / CONFIG).is_file():
        return [str(path)]
    pattern = str(path) if glob.has_magic(adapters) else f"{glob.escape(str(path))}/*"
    found = sorted(f for f in glob.glob(pattern) if (Path(f) / CONFIG).is_file())
    if not found:
        what = "holds no adapters" if path.is_dir() else "is missing"
        raise ConfigError(
            f"{KEY}: {adapters} {what}; an adapter is a folder with {CONFIG}, made by peft's save_pretrained "
            "or, of each task of a run, by `taskmoe export RUN --task all --out FOLDER`"
        )
    return found


def _as_low_rank(config: TaskMoEConfig, loras: Sequence[Lora]) -> TaskMoEConfig:
    names = dict.fromkeys(name for lora in loras for name in lora.factors)
    return replace(
        config,
        bank="low_rank",
        bank_options=None,
        r=max(lora.rank for lora in loras),
        lora_alpha=None,
        rank_pattern=None,
        target_modules=tuple(names),
        exclude_modules=None,
        layers_to_transform=None,
    )


def _check(model: nn.Module, loras: Sequence[Lora]) -> None:
    linears = {n: found for n, m in model.named_modules() if (found := features(m)) is not None}
    for lora in loras:
        for name, (A_rK, B_rN) in lora.factors.items():
            if name not in linears:
                near = difflib.get_close_matches(name, linears, n=1, cutoff=0.0)
                raise ConfigError(
                    f"{KEY}: {lora.folder} has {name}, which {type(model).__name__} lacks (the nearest is "
                    f"{', '.join(near)}); it belongs to another model"
                )
            if (A_rK.shape[1], B_rN.shape[1]) != linears[name]:
                sizes = f"{A_rK.shape[1]} x {B_rN.shape[1]}"
                own = "{} x {}".format(*linears[name])
                raise ConfigError(
                    f"{KEY}: {lora.folder}: {name} is {sizes}, and {own} in the model; another model's?"
                )


@torch.no_grad()
def _fill(bank: LowRankBank, name: str, loras: Sequence[Lora]) -> None:
    bank.A_ErK.zero_()
    bank.B_ErN.zero_()
    for e, lora in enumerate(loras):
        if name in lora.factors:
            A_rK, B_rN = lora.factors[name]
            bank.A_ErK[e, : len(A_rK)] = A_rK.to(bank.A_ErK)
            bank.B_ErN[e, : len(B_rN)] = B_rN.to(bank.B_ErN)
