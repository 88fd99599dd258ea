"""The schema of ``moe.regularisers``: what the loader accepts, and no more."""

from __future__ import annotations

import pytest

from taskmoe.moe.regularisers.kinds import REGULARISERS
from taskmoe.train.config_schema import schema


def errors(regularisers):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    return list(validator.iter_errors({"moe": {"regularisers": regularisers}}))


@pytest.mark.parametrize(
    "regularisers",
    [None, {"z_loss": 0.1}, {"entropy": -1}, {"window_balance": {"weight": 1, "decay": 0.5}},
     {"localised_balance": {"weight": 1, "tasks": ["a"], "experts": 2}}],
)  # fmt: skip
def test_what_is_allowed(regularisers):
    assert not errors(regularisers)


@pytest.mark.parametrize(
    "regularisers",
    [{"z_los": 0.1}, {"z_loss": -1}, {"z_loss": "x"}, {"z_loss": {"decay": 1}},
     {"window_balance": {"decay": 1}}, {"window_balance": {"weight": 1, "window": 5}}],
)  # fmt: skip
def test_what_is_not(regularisers):
    assert errors(regularisers)


def test_every_term_and_option_is_described():
    terms = schema()["properties"]["moe"]["properties"]["regularisers"]["properties"]
    assert terms.keys() == REGULARISERS.keys()
    for name, term in terms.items():
        assert len(term["description"]) > 20, name
        for option, entry in term["anyOf"][1]["properties"].items():
            assert entry.get("description"), (name, option)
