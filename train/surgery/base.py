"""What the ways of combining task gradients share: the signature, and an error that names the tasks.

Shapes: T tasks (rows of the Jacobian).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (gramian_TT fp64 on the CPU, mean diagonal 1, no zero row; this step's generator; the rows' task ids)
# -> weights_T fp64. The combined gradient is J' w.
Method = Callable[[Tensor, torch.Generator, Sequence[int]], Tensor]


class SurgeryError(RuntimeError):
    """Gradients that no combination can be made of; the message names the step and the tasks."""


def check_finite(gramian_TT: Tensor, step: int, rows: Sequence[int]) -> None:
    """Raises SurgeryError, naming the tasks whose gradient is not finite (or else whose products are not)."""
    bad_TT = ~torch.isfinite(gramian_TT)
    if not bad_TT.any():
        return
    bad_T = bad_TT.diagonal() if bad_TT.diagonal().any() else bad_TT.any(1)
    tasks = ", ".join(str(rows[t]) for t in bad_T.nonzero().squeeze(1).tolist())
    raise SurgeryError(
        f"step {step}: the gradient of task {tasks} is not finite; look at its loss and the learning rate"
    )
