"""A method by its name, of either kind."""

from __future__ import annotations

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.train.surgery.choose import choose
from taskmoe.train.surgery.combine import METHODS, Surgery
from taskmoe.train.surgery.direct import DIRECT, DirectSurgery


def test_both_kinds_are_found():
    assert isinstance(choose("sum"), Surgery) and isinstance(choose("graddrop"), DirectSurgery)
    assert choose("graddrop", {"leak": 0.5}, 3).state_dict()["seed"] == 3
    assert not set(METHODS) & set(DIRECT)


@pytest.mark.parametrize(("typo", "meant"), [("gradvaq", "gradvac"), ("pcgard", "pcgrad")])
def test_a_typo_is_answered_with_the_nearest_of_all(typo, meant):
    said = rf"'{typo}' is not one of sum, .*graddrop; the nearest is '{meant}'"
    with pytest.raises(ConfigError, match=said):
        choose(typo)
