"""From the Gramian of the task gradients to the weight of each task: the methods, and one object to call.

Every method here needs the T x T Gramian alone: with J the stacked task gradients, the combined gradient is
J' w. What is asked of a caller is therefore small: the Gramian of the gradients averaged over all ranks (it
is additive over shards and layers), and J' w.

Shapes: T rows, one a task; R rows with a gradient (R <= T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskmoe.train.choices import build, check_same_run, generator
from taskmoe.train.surgery.base import Method, SurgeryError, check_finite
from taskmoe.train.surgery.own import fixed, mean, nash_mtl, pcgrad, random_weights, total
from taskmoe.train.surgery.through_torchjd import aligned_mtl, cagrad, dualproj, imtl_g, mgda, upgrad


class Surgery:
    """One way to weight task gradients, the same on all ranks and after a resume.

    The Gramian is divided by the mean of its diagonal before a method sees it, so multiplying all losses by
    a constant changes no weight; solvers with absolute thresholds would otherwise take small gradients for
    none. Rows of zero norm (absent tasks) do not reach the method and get the weight 0; if there is no other,
    every weight is 1.

    Args:
        name: a key of :data:`METHODS`.
        options: the method's keyword arguments.
        seed: integer >= 0; with the step it fixes all random choices.

    Raises:
        ConfigError: an unknown method or option, an unusable value, or a package that is not installed.
    """

    def __init__(self, name: str = "sum", options: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        self.name, self.options, self.seed = name, dict(options or {}), int(seed)
        self._method: Method = build("surgery", METHODS, name, self.options)

    def weights(self, gramian_TT: Tensor, step: int, rows: Sequence[int] | None = None) -> Tensor:
        """The weight of each row.

        Args:
            gramian_TT: [T, T], any floating dtype, the same on all ranks; computed on the CPU in fp64.
            step: of the optimiser, >= 0.
            rows: the task id of each row; default 0..T-1.

        Returns:
            fp64 [T] on the CPU.

        Raises:
            SurgeryError: a Gramian that is not finite (its tasks are named), or a solver that failed.
            ValueError: shapes that do not fit.
        """
        ids = list(range(len(gramian_TT))) if rows is None else [int(row) for row in rows]
        if gramian_TT.shape != (len(ids), len(ids)):
            raise ValueError(f"a Gramian of shape {tuple(gramian_TT.shape)} for {len(ids)} rows")
        G_TT = gramian_TT.detach().to("cpu", torch.float64)
        check_finite(G_TT, step, ids)
        live_R = (G_TT.diagonal() > 0).nonzero().squeeze(1)
        if len(live_R) == 0:
            return torch.ones(len(ids), dtype=torch.float64)
        G_RR = G_TT[live_R][:, live_R]
        live_ids = [ids[t] for t in live_R.tolist()]
        w_R = self._method(G_RR / G_RR.diagonal().mean(), generator(self.seed, step), live_ids)
        if not torch.isfinite(w_R).all():
            raise SurgeryError(f"step {step}: {self.name!r} gave the weights {w_R.tolist()} to {live_ids}")
        w_T = torch.zeros(len(ids), dtype=torch.float64)
        w_T[live_R] = w_R
        return w_T

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must agree on: plain values. No method here has a state of its own."""
        return {"name": self.name, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run.

        Raises:
            ConfigError: another method or another seed.
        """
        check_same_run("surgery", state, self.name, self.seed)


METHODS: dict[str, Callable[..., Method]] = {
    "sum": total,
    "mean": mean,
    "pcgrad": pcgrad,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "cagrad": cagrad,
    "mgda": mgda,
    "nash_mtl": nash_mtl,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "random": random_weights,
    "fixed": fixed,
}
