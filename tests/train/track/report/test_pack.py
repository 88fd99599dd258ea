"""Packed arrays, unpacked as the page does it (its own unpacking runs in test_browser.py)."""

from __future__ import annotations

from base64 import b64decode

import numpy as np
import pytest

from taskmoe.train.track.report.pack import pack_bytes, pack_floats


def unpack_bytes(text: str, low: float, high: float) -> np.ndarray:
    steps = np.frombuffer(b64decode(text), dtype=np.uint8).astype(float)
    return np.where(steps == 255, np.nan, low + (high - low) * steps / 254)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0)])
def test_bytes_come_back_to_half_a_step(low: float, high: float) -> None:
    values = np.array([[low, high, (low + high) / 2], [np.nan, 0.1, 0.9]])
    found = unpack_bytes(pack_bytes(values, low, high), low, high).reshape(2, 3)
    np.testing.assert_allclose(found, values, atol=(high - low) / 254 / 2 + 1e-12)
    assert found[0, 0] == low and found[0, 1] == high and np.isnan(found[1, 0])


def test_what_lies_outside_is_clipped() -> None:
    assert unpack_bytes(pack_bytes([-3.0, 4.0], 0, 1), 0, 1).tolist() == [0.0, 1.0]


def test_floats_come_back() -> None:
    values = np.array([[1e-12, -3.5], [np.nan, 7e9]], dtype=np.float32)
    found = np.frombuffer(b64decode(pack_floats(values)), dtype="<f4").reshape(2, 2)
    np.testing.assert_array_equal(found, values)
