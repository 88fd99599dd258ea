"""One layer of a transformer over the routing groups, so that a layer's route depends on all others'.

Legend: S routing groups, Tb tasks in this batch, H heads of the experts, E experts, D task vector, F hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.routers.recurrent import require_several
from taskmoe.moe.tasks import TaskTable


class TransformerRouter(nn.Module):
    """Self-attention and an FFN (post-norm) over the groups, each of which enters as W t + b plus a vector
    of its own; a linear map gives the logits (Ye, Zha, Ren 2022).

    w_in_DF, b_in_F, places_SF; w_qkv_FQ (no bias: one on the keys would have no effect), w_mix_FF, b_mix_F,
    norm1_2F; w_up_FU, b_up_U, w_down_UF, b_down_F (U = 4 F, relu), norm2_2F; w_out_FE, b_out_E. All float32.
    norm: weight and bias.
    """

    uses: ClassVar[tuple[str, ...]] = (
        "representation", "num_experts", "num_heads", "router_scope", "router_hidden_dim",
    )  # fmt: skip
    task_dims: ClassVar[dict[str, int]] = {}
    over_groups: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """How it attends."""

        heads: int = 4  # of the attention; they divide router_hidden_dim

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for heads that do not divide, and as :func:`require_several`."""
        require_several(config)
        if options.heads < 1 or config.router_hidden_dim % options.heads:
            raise ConfigError(
                f"moe.router_options.heads: {options.heads} does not divide router_hidden_dim = "
                f"{config.router_hidden_dim}"
            )

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        require_several(config, len(groups))
        self.attention_heads = options_of("router", config, TransformerRouter).heads
        self.heads, self.experts = config.num_heads, config.num_experts
        F, out = config.router_hidden_dim, self.heads * self.experts
        self.w_in_DF, self.b_in_F = _matrix(dim, F), nn.Parameter(torch.zeros(F))
        self.places_SF = nn.Parameter(torch.randn(len(groups), F))
        self.w_qkv_FQ = _matrix(F, 3 * F)
        self.w_mix_FF, self.b_mix_F = _matrix(F, F), nn.Parameter(torch.zeros(F))
        self.norm1_2F = nn.Parameter(torch.stack([torch.ones(F), torch.zeros(F)]))
        self.w_up_FU, self.b_up_U = _matrix(F, 4 * F), nn.Parameter(torch.zeros(4 * F))
        self.w_down_UF, self.b_down_F = _matrix(4 * F, F), nn.Parameter(torch.zeros(F))
        self.norm2_2F = nn.Parameter(torch.stack([torch.ones(F), torch.zeros(F)]))
        self.w_out_FE, self.b_out_E = _matrix(F, out), nn.Parameter(torch.zeros(out))

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """vectors_TD: [Tb, D] -> logits [S, Tb, H, E]."""
        assert vectors_TD is not None
        x_TSF = (vectors_TD @ self.w_in_DF + self.b_in_F).unsqueeze(1) + self.places_SF
        x_TSF = _norm(x_TSF + self._attend(x_TSF), self.norm1_2F)
        hidden = torch.relu(x_TSF @ self.w_up_FU + self.b_up_U)
        x_TSF = _norm(x_TSF + hidden @ self.w_down_UF + self.b_down_F, self.norm2_2F)
        logits = x_TSF @ self.w_out_FE + self.b_out_E
        return logits.transpose(0, 1).unflatten(-1, (self.heads, self.experts))

    def _attend(self, x_TSF: Tensor) -> Tensor:
        split = (x_TSF @ self.w_qkv_FQ).unflatten(-1, (3, self.attention_heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # [Tb, attention heads, S, F / heads] each
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2) @ self.w_mix_FF + self.b_mix_F


def _matrix(d_in: int, d_out: int) -> nn.Parameter:
    bound = 1 / math.sqrt(d_in)
    return nn.Parameter(torch.empty(d_in, d_out).uniform_(-bound, bound))


def _norm(x: Tensor, weight_and_bias_2F: Tensor) -> Tensor:
    weight, bias = weight_and_bias_2F.unbind(0)
    return nn.functional.layer_norm(x, weight.shape, weight, bias)
