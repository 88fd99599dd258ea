"""Arrays as texts that JSON holds and the page unpacks (``data.js``): base64 of bytes or floats."""

from __future__ import annotations

from base64 import b64encode

import numpy as np
from numpy.typing import ArrayLike

LEVELS = 254  # of a byte; 255 stands for a number that is not known


def pack_bytes(values: ArrayLike, low: float, high: float) -> str:
    """Numbers in [low, high] to a 254th of the range, a byte each; NaN stays unknown, others are clipped."""
    numbers = np.asarray(values, dtype=np.float64)
    steps = np.clip((numbers - low) / (high - low), 0, 1) * LEVELS
    return _text(np.where(np.isnan(steps), LEVELS + 1, np.rint(steps)).astype(np.uint8))


def pack_floats(values: ArrayLike) -> str:
    """Numbers as float32, little endian."""
    return _text(np.asarray(values, dtype="<f4"))


def _text(values: np.ndarray) -> str:
    return b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
