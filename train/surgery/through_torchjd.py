"""Combinations whose weights torchjd computes from the Gramian (pip install taskmoe[surgery]).

Only its Gramian weightings are used, by name: classes that take the whole matrix accept a T x T input without
complaint and would return numbers that mean nothing. Its Nash-MTL is one of those (ours: ``nash_mtl``).

Scale: torchjd's weightings answer the mean of the tasks; here they are multiplied by T, so that the same
learning rate serves all methods. On orthogonal gradients of equal norm every method below gives w = 1, the
weights of ``sum``.

Shapes: T tasks. ``G_TT`` is the Gramian J J' of their gradients, scaled to a mean diagonal of one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.choices import number, whole
from taskmoe.train.surgery.base import Method, SurgeryError


def upgrad(reg_eps: float = 1e-8) -> Method:
    """Each gradient projected onto the dual cone of all; their sum (UPGrad, Quinton and Rey, 2406.16232).

    To first order the update raises no task's loss, whatever the number of tasks: <g_t, d> is at least
    -reg_eps tr(G) w_t. Where nothing conflicts it is ``sum``.

    Args:
        reg_eps: added to the diagonal of the Gramian (of trace one) so that the solver sees a definite one.
            torchjd's own 1e-4 is the squared norm of a gradient 100 times smaller than the others: conflicts
            with such a task would stay (a cosine of -0.15 was seen).
    """
    number("surgery.options.reg_eps", reg_eps, 0.0, open_low=True)
    return _weighting("upgrad", lambda agg, lin: agg.UPGradWeighting(projector=_projector(lin, reg_eps)))


def dualproj(reg_eps: float = 1e-8) -> Method:
    """The sum of the gradients projected onto their dual cone (GEM, Lopez-Paz et al. 2017, arXiv 1706.08840).

    Non-conflicting as ``upgrad`` is; but a large gradient may leave nothing of a small one.

    Args:
        reg_eps: as for ``upgrad``.
    """
    number("surgery.options.reg_eps", reg_eps, 0.0, open_low=True)
    return _weighting("dualproj", lambda agg, lin: agg.DualProjWeighting(projector=_projector(lin, reg_eps)))


def cagrad(c: float = 0.4, rescale: bool = True) -> Method:
    """max_d min_t <g_t, d> for |d - g_0| <= c |g_0|, g_0 the mean (CAGrad, Liu et al., arXiv 2110.14048).

    ``c = 0`` is ``sum``; below 1 it converges to a minimum of the average loss. Close to a Pareto-stationary
    point (|g_w| under 1e-4 of the Jacobian's norm) the weights are zero.

    Args:
        c: radius, as a share of |g_0|.
        rescale: divide by 1 + c, the factor by which the update is longer where gradients agree. Without it
            the method also acts as a higher learning rate.
    """
    number("surgery.options.c", c, 0.0)
    if not isinstance(rescale, bool):
        raise ConfigError(f"surgery.options.rescale: {rescale!r} is neither true nor false")
    return _weighting("cagrad", lambda agg, lin: agg.CAGradWeighting(c=c), 1 / (1 + c) if rescale else 1.0)


def mgda(epsilon: float = 1e-3, max_iterations: int = 100) -> Method:
    """The shortest convex combination (MGDA, Desideri 2012; solver: Sener and Koltun 2018, arXiv 1810.04650).

    Small gradients dominate it. The Frank-Wolfe solver stops early, at a step under ``epsilon``.
    """
    number("surgery.options.epsilon", epsilon, 0.0, open_low=True)
    whole("surgery.options.max_iterations", max_iterations, 1)
    return _weighting("mgda", lambda agg, lin: agg.MGDAWeighting(epsilon=epsilon, max_iters=max_iterations))


def imtl_g() -> Method:
    """Equal projections of the update on all gradients (IMTL-G, Liu et al. 2021, ICLR; sum of weights T).

    Weights may be negative, and large where gradients are nearly dependent.
    """
    return _weighting("imtl_g", lambda agg, lin: agg.IMTLGWeighting())


def aligned_mtl(scale_mode: str = "min") -> Method:
    """The principal components of the Jacobian brought to one length (Aligned-MTL, Senushkin et al. 2023).

    Args:
        scale_mode: that length: of the ``min`` component, the ``median`` one, or ``rmse`` over all.
    """
    if scale_mode not in ("min", "median", "rmse"):
        raise ConfigError(f"surgery.options.scale_mode: {scale_mode!r} is none of 'min', 'median', 'rmse'")
    return _weighting("aligned_mtl", lambda agg, lin: agg.AlignedMTLWeighting(scale_mode=scale_mode))


def _projector(linalg: Any, reg_eps: float) -> Any:
    return linalg.QuadprogProjector(norm_eps=0.0, reg_eps=reg_eps)


def _weighting(name: str, make: Callable[[Any, Any], Any], factor: float = 1.0) -> Method:
    try:
        weighting = make(
            importlib.import_module("torchjd.aggregation"), importlib.import_module("torchjd.linalg")
        )
    except ImportError as error:
        raise ConfigError(
            f"surgery.method: {name!r} needs torchjd and a solver; pip install 'taskmoe[surgery]' ({error})"
        ) from error

    def weights(G_TT: Tensor, gen: torch.Generator, rows: Sequence[int]) -> Tensor:
        try:
            w_T: Tensor = weighting(G_TT)
        except Exception as error:  # each solver raises its own kind
            raise SurgeryError(f"{name}: the solver failed for the tasks {list(rows)}: {error}") from error
        return factor * len(rows) * w_T

    return weights
