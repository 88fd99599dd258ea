"""A recurrent network over the routing groups, so that a layer's route depends on its neighbours'.

Legend: S routing groups, Tb tasks in this batch, H heads, E experts, D task vector, F hidden, C directions (1
or 2), Q the cell's own gates x F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.tasks import TaskTable

State = tuple[Tensor, ...]  # the hidden state [Tb, F] first
# What the input and the hidden state ask for ([Tb, Q] each), and the state -> the next state.
Cell = Callable[[Tensor, Tensor, State], State]


def _rnn(x_TQ: Tensor, h_TQ: Tensor, state: State) -> State:
    return (torch.tanh(x_TQ + h_TQ),)


def _gru(x_TQ: Tensor, h_TQ: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x_TQ.chunk(3, -1), h_TQ.chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return ((1 - z) * new + z * state[0],)


def _lstm(x_TQ: Tensor, h_TQ: Tensor, state: State) -> State:
    i, f, g, o = (x_TQ + h_TQ).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


CELLS: dict[str, tuple[Cell, int, int]] = {  # name: (cell, its gates, tensors of its state)
    "rnn": (_rnn, 1, 1),
    "gru": (_gru, 3, 1),
    "lstm": (_lstm, 4, 2),
}


class RecurrentRouter(nn.Module):
    """A cell walks over the groups in the order of the model, its input the task's vector plus one of the
    group; a linear map on its hidden states gives the logits (Ye, Zha, Ren 2022).

    places_SD: [S, D]. w_in_CDQ, w_hidden_CFQ, b_in_CQ, b_hidden_CQ: the cell, in the order of torch.nn's
    gates. w_out_FE, b_out_E: [C * F, H * E]. All float32. Plain operations, as surgery differentiates many
    rows at once through them.
    """

    uses: ClassVar[tuple[str, ...]] = (
        "representation", "num_experts", "num_heads", "router_scope", "router_hidden_dim",
    )  # fmt: skip
    task_dims: ClassVar[dict[str, int]] = {}
    over_groups: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """Which cell, and which ways it goes."""

        cell: str = "gru"  # rnn | gru | lstm
        bidirectional: bool = True  # once from the first layer on and once from the last

        def __post_init__(self) -> None:
            if self.cell not in CELLS:
                known = ", ".join(CELLS)
                raise ConfigError(f"moe.router_options.cell: {self.cell!r} is unknown; known are {known}")

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError where the scope says that there is one group."""
        require_several(config)

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        require_several(config, len(groups))
        options = options_of("router", config, RecurrentRouter)
        self.cell, gates, self.tensors = CELLS[options.cell]
        self.heads, self.experts, self.hidden = config.num_heads, config.num_experts, config.router_hidden_dim
        C, F, out = 1 + options.bidirectional, self.hidden, self.heads * self.experts
        Q, bound = gates * F, 1 / math.sqrt(F)
        self.places_SD = nn.Parameter(torch.randn(len(groups), dim))
        self.w_in_CDQ = nn.Parameter(torch.empty(C, dim, Q).uniform_(-bound, bound))
        self.w_hidden_CFQ = nn.Parameter(torch.empty(C, F, Q).uniform_(-bound, bound))
        self.b_in_CQ = nn.Parameter(torch.zeros(C, Q))
        self.b_hidden_CQ = nn.Parameter(torch.zeros(C, Q))
        high = 1 / math.sqrt(C * F)
        self.w_out_FE = nn.Parameter(torch.empty(C * F, out).uniform_(-high, high))
        self.b_out_E = nn.Parameter(torch.zeros(out))

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """vectors_TD: [Tb, D] -> logits [S, Tb, H, E]."""
        assert vectors_TD is not None
        inputs_STD = vectors_TD + self.places_SD.unsqueeze(1)
        ways = [self._walk(inputs_STD, 0)]
        if len(self.w_in_CDQ) > 1:
            ways.append(self._walk(inputs_STD.flip(0), 1).flip(0))
        logits = torch.cat(ways, -1) @ self.w_out_FE + self.b_out_E
        return logits.unflatten(-1, (self.heads, self.experts))

    def _walk(self, inputs_STD: Tensor, way: int) -> Tensor:
        """inputs_STD: [S, Tb, D] -> hidden states [S, Tb, F]."""
        x_STQ = inputs_STD @ self.w_in_CDQ[way] + self.b_in_CQ[way]
        state: State = (x_STQ.new_zeros(x_STQ.shape[1], self.hidden),) * self.tensors
        seen = []
        for x_TQ in x_STQ.unbind(0):
            state = self.cell(x_TQ, state[0] @ self.w_hidden_CFQ[way] + self.b_hidden_CQ[way], state)
            seen.append(state[0])
        return torch.stack(seen)


def require_several(config: TaskMoEConfig, groups: int | None = None) -> None:
    """groups: how many there are; None: not known yet.

    Raises:
        ConfigError: a router over layers has one group only.
    """
    if config.router_scope == "model" if groups is None else groups < 2:
        raise ConfigError(
            f"moe.router_scope: {config.router_scope!r} makes one routing group of all layers, but router "
            f"{config.router!r} goes over several; use router_scope: layer"
        )
