"""Terms of the routing of tokens in a layer; padding counts for nothing.

Legend: M rows, E experts, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.gates import GATES
from taskmoe.moe.options import options_of
from taskmoe.moe.regularisers.base import OfTokens, Rows
from taskmoe.moe.tasks import TaskError, TaskTable
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS


def _check_logits(name: str, config: TaskMoEConfig) -> None:
    if "raw" in getattr(TOKEN_ROUTERS.get(config.router), "gates", ()):
        raise ConfigError(
            f"moe.regularisers.{name}: reads the logits of a router, and moe.router {config.router!r} gives "
            "gates; leave it out, or use the regulariser token_cv"
        )


class TokenBalance(OfTokens):
    """E sum_e f_e P_e: f_e the share of gates that are not zero which expert e has (no gradient), P_e the
    mean of softmax(logits) (Switch Transformers, Fedus et al. 2022, arXiv 2101.03961).

    For gates without zeros f is level and the term is constant: it is meant for top-k and one-hot gates, of
    routers that give logits.
    """

    def __init__(self, options: Any, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        _check_logits("token_balance", config)
        gate = GATES[config.gate]
        if not gate.chooses(options_of("gate", config, gate)):
            raise ConfigError(
                f"moe.regularisers.token_balance: gate {config.gate!r} sends every token to every expert, so "
                "the loads are equal; use a gate that leaves experts out, such as top_k, or the regulariser "
                "token_cv"
            )

    def value(self, logits_ME: Tensor, gates_ME: Tensor, rows: Rows) -> Tensor:
        weights_M1 = rows.weights_M.unsqueeze(1)
        chosen_ME = (gates_ME.detach() > 0) * weights_M1
        load_E = chosen_ME.sum(0) / chosen_ME.sum().clamp_min(1)
        shares_E = (torch.softmax(logits_ME, -1) * weights_M1).sum(0) / rows.weights_M.sum().clamp_min(1)
        return load_E.numel() * (load_E * shares_E).sum()


class TokenZLoss(OfTokens):
    """logsumexp_e(z)^2, the mean over tokens (ST-MoE, Zoph et al. 2022, arXiv 2202.08906)."""

    def __init__(self, options: Any, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        _check_logits("token_z_loss", config)

    def value(self, logits_ME: Tensor, gates_ME: Tensor, rows: Rows) -> Tensor:
        squares_M = torch.logsumexp(logits_ME, dim=-1).square()
        return (squares_M * rows.weights_M).sum() / rows.weights_M.sum().clamp_min(1)


class TokenCV(OfTokens):
    """Var_e(I_e) / mean_e(I_e)^2 of the importance I_e = sum of gates (Shazeer et al. 2017, arXiv
    1701.06538).
    """

    couples: ClassVar[bool] = True

    def value(self, logits_ME: Tensor, gates_ME: Tensor, rows: Rows) -> Tensor:
        importance_E = (gates_ME * rows.weights_M.unsqueeze(1)).sum(0)
        return importance_E.var(correction=0) / importance_E.mean().square().clamp_min(1e-12)


class LocalisedBalance(OfTokens):
    """Var(Z) / mean(Z), Z = I * Q (LoRAMoE, Dou et al. 2024, arXiv 2312.09979).

    Q_eb: mean gate of expert e over the tokens of sequence b (theirs is the sum, so that long sequences count
    more). I_eb = 1 + delta if expert and sequence are of one kind, else 1 - delta. The first ``experts``
    experts of each layer (half of those it has) and the tasks named in ``tasks`` are one kind, all others the
    second.

    Z is level where Q is proportional to 1 / I: as the paper writes it, delta above 0 draws matching gates
    *below* the others. A delta below 0 turns that round.
    """

    couples: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        tasks: tuple[str, ...] = ()  # tasks of the first kind
        experts: int | None = None  # how many of a layer's experts are of the first kind; null: half
        delta: float = 0.1  # how far the two kinds are told apart, between -1 and 1

    def __init__(self, options: Options, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        key = "moe.regularisers.localised_balance"
        for E in (config.num_experts, *(config.expert_pattern or {}).values()):
            if not 0 < self._first(E) < E:
                raise ConfigError(f"{key}.experts: {self._first(E)} of {E} must leave both kinds an expert")
        if not -1 < options.delta < 1:
            raise ConfigError(f"{key}.delta: {options.delta} must be between -1 and 1")
        if not options.tasks:
            raise ConfigError(f"{key}.tasks: is empty; name the tasks of the first kind")
        try:
            self.tasks = {tasks.id(name) for name in options.tasks} if len(tasks) else set()
        except TaskError as error:
            raise ConfigError(f"{key}.tasks: {error}") from error

    def _first(self, E: int) -> int:
        return E // 2 if self.options.experts is None else int(self.options.experts)

    def value(self, logits_ME: Tensor, gates_ME: Tensor, rows: Rows) -> Tensor:
        B, E = int(rows.sequences), gates_ME.shape[1]
        weighted_ME = gates_ME * rows.weights_M.unsqueeze(1)
        sums_BE = gates_ME.new_zeros(B, E).index_add(0, rows.sequences_M, weighted_ME)
        lengths_B = gates_ME.new_zeros(B).index_add(0, rows.sequences_M, rows.weights_M)
        kinds_B = self._kinds(rows, B)
        kinds_E = torch.arange(E, device=gates_ME.device) < self._first(E)
        signs_BE = torch.where(kinds_B[:, None] == kinds_E, 1.0, -1.0).to(gates_ME)
        Z_BE = (1 + self.options.delta * signs_BE) * sums_BE / lengths_B.clamp_min(1).unsqueeze(1)
        here_B1 = (lengths_B > 0).to(Z_BE).unsqueeze(1)
        n = here_B1.sum().clamp_min(1) * E
        mean = (Z_BE * here_B1).sum() / n
        return ((Z_BE - mean).square() * here_B1).sum() / n / mean.clamp_min(1e-12)

    def _kinds(self, rows: Rows, B: int) -> Tensor:
        first: Sequence[bool] = [t in self.tasks for t in rows.tasks]
        of_task = torch.tensor(first, device=rows.tasks_M.device)
        kinds_B = torch.zeros(B, dtype=torch.bool, device=rows.tasks_M.device)
        return kinds_B.index_put((rows.sequences_M,), of_task[rows.tasks_M])
