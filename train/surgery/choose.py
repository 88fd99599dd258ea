"""A method by its name, of either kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskmoe.train.choices import check_name
from taskmoe.train.surgery.combine import METHODS, Surgery
from taskmoe.train.surgery.direct import DIRECT, DirectSurgery


def choose(name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> Surgery | DirectSurgery:
    """The method of this name.

    Raises:
        ConfigError: an unknown name (the nearest of all is named), or as :class:`Surgery`.
    """
    check_name("surgery", [*METHODS, *DIRECT], name)
    return (DirectSurgery if name in DIRECT else Surgery)(name, options, seed)
