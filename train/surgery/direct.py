"""Combinations that one weight per task cannot express: GradVac (weights per layer) and GradDrop (per entry).

They see the Jacobian itself, or a block of its columns: a rank that holds columns [offset, offset + P) of the
whole says so, and gives a ``reduce`` that adds Gramians up over the ranks.

Shapes: T rows, one a task; P columns held here; S layers (``sizes`` splits the columns into them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from taskmoe.train.choices import build, check_same_run, generator, number
from taskmoe.train.surgery.base import SurgeryError, check_finite
from taskmoe.train.surgery.gramian import gramian

Reduce = Callable[[Tensor], Tensor]

_CLOSEST = 1 - 1e-6  # a target of exactly 1 would ask for an infinite correction
_CHUNK = 1 << 20  # columns that GradDrop works on at a time


class Direct(Protocol):
    """A method of the direct path, with its state (tensors and plain values)."""

    def __call__(
        self,
        J_TP: Tensor,
        sizes: Sequence[int],
        gen: torch.Generator,
        rows: Sequence[int],
        step: int,
        offset: int,
        reduce: Reduce,
    ) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DirectSurgery:
    """One way to combine task gradients into one vector, the same on all ranks and after a resume.

    Args:
        name: a key of :data:`DIRECT`.
        options: the method's keyword arguments.
        seed: integer >= 0; with the step it fixes all random choices.

    Raises:
        ConfigError: an unknown method or option, or an unusable value.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        self.name, self.options, self.seed = name, dict(options or {}), int(seed)
        self._method: Direct = build("surgery", DIRECT, name, self.options)

    def combine(
        self,
        jacobian_TP: Tensor,
        sizes: Sequence[int],
        step: int,
        rows: Sequence[int] | None = None,
        *,
        offset: int = 0,
        reduce: Reduce | None = None,
    ) -> Tensor:
        """The combined gradient. It changes the state: once a step.

        Args:
            jacobian_TP: [T, P] fp32 or fp64, averaged over ranks; all columns or a block of them.
            sizes: columns of each layer among these P, in order; they sum to P. Every rank lists every layer.
            step: of the optimiser, >= 0.
            rows: the task id of each row; default 0..T-1. State is kept by task id.
            offset: where this block of columns stands in the whole.
            reduce: adds an fp64 tensor [S, T, T] on the CPU up over the ranks; default: this is the whole.

        Returns:
            [P], of the Jacobian's dtype and device.

        Raises:
            SurgeryError: gradients that are not finite (their tasks are named).
            ValueError: shapes that do not fit.
        """
        T, P = jacobian_TP.shape
        ids = list(range(T)) if rows is None else [int(row) for row in rows]
        if sum(sizes) != P or len(ids) != T:
            raise ValueError(f"a Jacobian of [{T}, {P}] for {len(ids)} rows and {sum(sizes)} columns")
        gen = generator(self.seed, step)
        add = reduce or (lambda G_STT: G_STT)
        return self._method(jacobian_TP.detach(), list(sizes), gen, ids, step, offset, add)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, fit for ``torch.load(weights_only=True)``."""
        return {"name": self.name, "seed": self.seed, "method": self._method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run.

        Raises:
            ConfigError: another method or another seed.
        """
        check_same_run("surgery", state, self.name, self.seed)
        self._method.load_state_dict(state["method"])


class GradVac:
    """Gradient Vaccine (Wang et al. 2021, arXiv 2010.05874), with its weights solved per layer.

    As PCGrad, but g_i is turned towards g_j until their cosine reaches a target phi_ij (an average of the
    cosines seen) instead of zero. phi starts at 0, so the first step is PCGrad per layer. Scale: the sum of
    the corrected gradients; equals ``sum`` where every cosine is above its target. The cosine averaged is
    that of the already corrected g_i, as in the paper's algorithm 1.

    Args:
        beta: share of the newest cosine in phi; the paper's 1e-2.
    """

    def __init__(self, beta: float = 1e-2) -> None:
        self.beta = number("surgery.options.beta", beta, 0.0, 1.0)
        self._phi_STT = np.zeros((0, 0, 0))  # by task id; grows as ids appear

    def __call__(
        self,
        J_TP: Tensor,
        sizes: Sequence[int],
        gen: torch.Generator,
        rows: Sequence[int],
        step: int,
        offset: int,
        reduce: Reduce,
    ) -> Tensor:
        parts = J_TP.split(list(sizes), dim=1)
        G_STT = reduce(torch.stack([gramian(part) for part in parts]))
        for G_TT in G_STT:
            check_finite(G_TT, step, rows)
        self._grow(len(sizes), max(rows, default=-1) + 1)
        combined = []
        for layer, part in enumerate(parts):
            live = [t for t in range(len(rows)) if G_STT[layer, t, t] > 0]
            here = np.ix_([layer], [rows[t] for t in live], [rows[t] for t in live])
            phi_RR = self._phi_STT[here][0]
            w_R = _vaccinate(G_STT[layer].numpy()[np.ix_(live, live)], phi_RR, self.beta, gen)
            self._phi_STT[here] = phi_RR
            w_T = torch.zeros(len(rows), dtype=torch.float64)
            w_T[live] = torch.from_numpy(w_R)
            combined.append(w_T.to(part.device, part.dtype) @ part)
        return torch.cat(combined)

    def _grow(self, layers: int, tasks: int) -> None:
        S, T, _ = self._phi_STT.shape
        if layers > S or tasks > T:
            wider = np.zeros((max(S, layers), max(T, tasks), max(T, tasks)))
            wider[:S, :T, :T] = self._phi_STT
            self._phi_STT = wider

    def state_dict(self) -> dict[str, Any]:
        return {"phi": torch.from_numpy(self._phi_STT.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phi_STT = state["phi"].numpy().copy()


class GradDrop:
    """Sign dropout (GradDrop, Chen et al. 2020, arXiv 2010.06808), on the gradients of the parameters.

    Each entry keeps the gradients of one sign: the positive ones with probability 1/2 (1 + sum g / sum |g|).
    Where signs agree it is ``sum``. The paper drops gradients of activations; with parameters shared over
    the batch the same rule applies to theirs. An entry's random number depends on (seed, step, its column)
    alone, so blocks of columns give what the whole gives.

    Args:
        leak: share of the other sign that passes, in [0, 1]; 1 is ``sum``.
    """

    def __init__(self, leak: float = 0.0) -> None:
        self.leak = number("surgery.options.leak", leak, 0.0, 1.0)

    def __call__(
        self,
        J_TP: Tensor,
        sizes: Sequence[int],
        gen: torch.Generator,
        rows: Sequence[int],
        step: int,
        offset: int,
        reduce: Reduce,
    ) -> Tensor:
        key = int(torch.randint(1 << 62, (1,), generator=gen))
        out = []
        for start in range(0, J_TP.shape[1], _CHUNK):
            J_Tp = J_TP[:, start : start + _CHUNK]
            if not torch.isfinite(J_Tp).all():
                bad = [rows[t] for t in range(len(rows)) if not torch.isfinite(J_Tp[t]).all()]
                tasks = ", ".join(map(str, bad))
                raise SurgeryError(f"step {step}: the gradient of task {tasks} is not finite")
            u_p = torch.from_numpy(_uniforms(key, offset + start, J_Tp.shape[1])).to(J_Tp.device)
            size_p = J_Tp.abs().sum(0).double()
            purity_p = 0.5 * (1 + J_Tp.sum(0).double() / size_p.clamp(min=torch.finfo(torch.float64).tiny))
            keep_Tp = torch.where(purity_p > u_p, J_Tp > 0, J_Tp < 0).to(J_Tp.dtype)
            out.append(((self.leak + (1 - self.leak) * keep_Tp) * J_Tp).sum(0))
        return torch.cat(out) if out else J_TP.new_zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def _vaccinate(G_RR: np.ndarray, phi_RR: np.ndarray, beta: float, gen: torch.Generator) -> np.ndarray:
    """The weights [R] of the corrected gradients' sum; ``phi_RR`` moves towards the cosines seen."""
    R = len(G_RR)
    w_RR = np.eye(R)
    for i, w_R in enumerate(w_RR):
        for j in torch.randperm(R, generator=gen).tolist():
            square = w_R @ G_RR @ w_R
            if j == i or square <= 1e-24 * G_RR[i, i]:  # cancelled to rounding: it has no direction
                continue
            norm_i, norm_j = math.sqrt(square), math.sqrt(G_RR[j, j])
            cosine = min(1.0, max(-1.0, float(G_RR[j] @ w_R) / (norm_i * norm_j)))
            target = min(phi_RR[i, j], _CLOSEST)
            if cosine < target:
                lack = target * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - target**2)
                w_R[j] += norm_i * lack / (norm_j * math.sqrt(1 - target**2))
            phi_RR[i, j] = (1 - beta) * phi_RR[i, j] + beta * cosine
    return w_RR.sum(0)


def _uniforms(key: int, start: int, n: int) -> np.ndarray:
    """[n] float64 in (0, 1): a function of the key and the positions alone."""
    bits = np.random.Philox(key=key)
    bits.advance(start // 4)  # a Philox block is four words
    words = bits.random_raw(start % 4 + n)[start % 4 :]
    return ((words >> np.uint64(11)) + 0.5) * 2.0**-53


DIRECT: dict[str, Callable[..., Direct]] = {"gradvac": GradVac, "graddrop": GradDrop}
# Those that treat each entry by itself, without state: they may be given one run of columns after another.
BY_ENTRY = ("graddrop",)
