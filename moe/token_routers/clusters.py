"""A router of the token and of what the instance is about (MoR1E / T-REX), and its centroids.

Legend: B sequences, M rows, K d_in, E experts (one a cluster), D instance embedding, G 1 or the tasks of the
batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import shrink
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context, RowSpaceError
from taskmoe.moe.options import options_of
from taskmoe.moe.parts import by_row
from taskmoe.moe.tasks import TaskError, TaskTable

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel


class TokenClusterRouter(Bank):
    """g = out * (w * E * softmax(W x) + (1 - w) * cluster_scale * C e) (MoR1E / T-REX, arXiv 2404.08985).

    w = sigmoid(speed * omega): how much the token counts beside the instance. out = sigmoid(speed * beta):
    how much all experts count beside the base. The two learned scalars, omega_1 and beta_1, start at 0, so
    that both shares are 1/2; with Adam, ``speed`` acts as a learning rate ``speed`` times as high. e is the
    embedding of the row's sequence (``instance_embeddings`` of the model's forward), C the centroids of the
    training instances: similarities are taken as they are, and may be negative.

    weight_E1K: [E, 1, K], uniform in +-1 / sqrt(K) (theirs is zero, under which freely paired halves
    stay equal); omega_1, beta_1: [1], zero; all float32. centroids_ED: [E, D], a buffer saved with the
    adapter, zero until :func:`set_centroids`.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts", "router_temperature")
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True
    gates: ClassVar[tuple[str, ...]] = ("raw",)  # what it gives are gates
    centroids_ED: Tensor

    @dataclass(frozen=True)
    class Options:
        dim: int = 768  # of the instances' embeddings
        encoder: str = "hashed_words"  # who makes them in a run: hashed_words, or a Hugging Face encoder
        cluster_scale: float = 4.0  # of the similarities to centroids; 0: the token alone
        speed: float = 100.0  # of the two mixing scalars

        def __post_init__(self) -> None:
            if self.dim < 1 or not self.speed > 0:
                key, found = ("dim", self.dim) if self.dim < 1 else ("speed", self.speed)
                raise ConfigError(f"moe.router_options.{key}: {found} must be above 0")

    @staticmethod
    def reads_instances(options: Options) -> bool:
        """Whether the model must be told what each sequence is about."""
        return options.cluster_scale != 0

    @classmethod
    def packs(cls, options: Options) -> bool:
        """A row of several sequences is not about one thing."""
        return not cls.reads_instances(options)

    @classmethod
    def idle(cls, options: Options) -> dict[str, str]:
        """Without the clusters no instance is embedded."""
        unread = "cluster_scale is 0, so that no instance is read"
        return {} if cls.reads_instances(options) else dict.fromkeys(("dim", "encoder"), unread)

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.options = options_of("router", config, type(self))
        E, bound = config.num_experts, 1 / math.sqrt(d_in)
        self.weight_E1K = nn.Parameter(torch.empty(E, 1, d_in).uniform_(-bound, bound))
        self.omega_1, self.beta_1 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.register_buffer("centroids_ED", torch.zeros(E, self.options.dim))
        self.total = E / 4  # of the gates at the start, without the clusters

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> gates [M, E] float32 (float64 for float64 rows).

        Raises:
            TaskError: the model was called without instance_embeddings, or with others than [B, dim].
            RowSpaceError: packed rows, which hold several instances.
        """
        weight_GE1K, omega_G1, beta_G1 = context.factors(self.weight_E1K, self.omega_1, self.beta_1)
        speed, E = self.options.speed, len(self.weight_E1K)
        w_M1 = by_row(torch.sigmoid(speed * omega_G1), plan)
        logits_ME = shrink(x_MK, [weight_GE1K], [None], plan)[0]
        token_ME = E * torch.softmax(logits_ME / context.temperature, dim=1)
        gates_ME = w_M1 * token_ME
        if self.reads_instances(self.options):
            gates_ME = gates_ME + (1 - w_M1) * self._similarities(x_MK, context)
        return by_row(torch.sigmoid(speed * beta_G1), plan) * gates_ME

    def _similarities(self, x_MK: Tensor, context: Context) -> Tensor:
        """[M, E], cluster_scale * C e of each row's sequence."""
        e_BD, B = context.instances, context.num_sequences
        if context.packed:
            raise RowSpaceError("token_cluster takes one instance a sequence; set data.packing to false")
        if e_BD is None or e_BD.shape != (B, self.options.dim):
            found = "none" if e_BD is None else str(tuple(e_BD.shape))
            raise TaskError(
                f"instance_embeddings: {found} for router 'token_cluster'; give the model one embedding a "
                f"sequence, {(B, self.options.dim)} (moe.router_options.dim)"
            )
        similar_BE = e_BD.to(self.centroids_ED) @ self.centroids_ED.T
        return self.options.cluster_scale * similar_BE.repeat_interleave(len(x_MK) // B, dim=0)

    def extra_repr(self) -> str:
        return f"num_experts={len(self.weight_E1K)}, d_in={self.weight_E1K.shape[2]}, dim={self.options.dim}"


@torch.no_grad()
def set_centroids(model: TaskMoEModel, centroids_ED: Tensor) -> None:
    """Give every router of ``model`` the centroids of its training instances: [E, D] floating.

    Raises:
        ConfigError: the model has no such router, or needs another number or size of them.
    """
    routers = [m for m in model.modules() if isinstance(m, TokenClusterRouter)]
    if not routers:
        raise ConfigError(f"moe.router: {model.moe_config.router!r} takes no centroids; use token_cluster")
    for router in routers:
        if centroids_ED.shape != router.centroids_ED.shape:
            raise ConfigError(
                f"centroids are {tuple(centroids_ED.shape)}; moe.num_experts and moe.router_options.dim ask "
                f"for {tuple(router.centroids_ED.shape)}"
            )
    for router in routers:
        router.centroids_ED.copy_(centroids_ED)
