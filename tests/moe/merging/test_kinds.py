"""Options of the ways of merging, checked like other settings."""

from __future__ import annotations

import pytest

from taskmoe.moe import ConfigError
from taskmoe.moe.merging.kinds import merger


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"density": 0.0}, r"merge.options.density: 0.0 is not in \(0, 1\]"),
        ("ties", {"density": "most"}, "merge.options.density: 'most' is not float"),
        ("ties", {"space": "deltas"}, "merge.options.space: 'deltas' is not one of delta, factors"),
        ("breadcrumbs", {"drop": 1.0}, r"merge.options.drop: 1.0 is not in \[0, 1\)"),
        ("breadcrumbs", {"drop": 0.5, "keep": 0.6}, "merge.options.keep: 0.6 and drop: 0.5 are more than 1"),
        ("breadcrumbs", {"scope": "model"}, "merge.options.scope: 'model' is not one of linear, row"),
        ("copa", {"floor": 1.0}, r"merge.options.floor: 1.0 is not in \[0, 1\)"),
        ("svd_mean", {"rank": 0}, "merge.options.rank: 0 must be at least 1"),
        ("task_arithmetic", {"density": 0.2}, "merge.options.density: unknown option of method"),
    ],
)
def test_options_that_cannot_be_used(method, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        merger(method, options)
