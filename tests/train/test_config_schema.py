"""The JSON schema of all settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from taskmoe.moe.choices import SEAMS, readers_of
from taskmoe.moe.config import ALIASES
from taskmoe.moe.options import GENERAL, default_options
from taskmoe.train.config_comments import field_comments
from taskmoe.train.config_decode import known_paths
from taskmoe.train.config_io import dump, load
from taskmoe.train.config_schema import schema
from taskmoe.train.schedule import REINIT

CONFIGS = Path(__file__).parents[2] / "configs"


def test_schema_has_every_key_with_type_default_and_description() -> None:
    built = schema()

    def at(path: str) -> dict[str, Any]:
        node = built
        for part in path.split("."):
            node = node["items"] if part == "*" else node["properties"][part]
        return node

    for path in known_paths():
        entry = at(path)
        assert "type" in entry or "anyOf" in entry, path
        assert "default" in entry, path
    assert at("moe.r") == {
        "type": "integer",
        "minimum": 1,
        "default": 4,
        "description": "rank of one expert; rank-1 experts are r = 1",
        "x-read-by": [f"{seam}: {name}" for seam, name in readers_of("r")],
    }
    assert at("warmup_ratio") == {"type": "number", "minimum": 0, "maximum": 1, "default": 0.03}
    assert at("max_grad_norm")["description"] == "0: no clipping"
    assert at("moe.gate")["enum"] and at("mixing.strategy")["enum"][0] == "proportional"
    assert at("moe.n_skills")["description"] == "another name of num_experts"
    assert at("phases.*.train")["items"]["enum"][0] == "base"
    assert at("phases.*.router_temperature")["minItems"] == 2
    assert at("task_weights")["additionalProperties"] == {"type": "number", "minimum": 0}
    assert built["additionalProperties"] is False


def test_schema_describes_what_the_loader_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    for path in CONFIGS.rglob("*.yaml"):
        assert not list(validator.iter_errors(yaml.safe_load(dump(load(path))))), path
    assert list(validator.iter_errors({"learning_rat": 1}))


def test_schema_says_which_choice_reads_which_key() -> None:
    moe = schema()["properties"]["moe"]
    for key, entry in moe["properties"].items():
        readers = [f"{seam}: {name}" for seam, name in readers_of(ALIASES.get(key, key))]
        assert readers or key in GENERAL or key.endswith("_options"), f"nothing reads {key}"
        assert key in GENERAL or entry.get("x-read-by", []) == readers, key
    assert moe["properties"]["top_k"]["x-read-by"] == ["gate: top_k"]
    phase = schema()["properties"]["phases"]["items"]["properties"]
    assert phase["gate"]["enum"] == [*SEAMS["gate"], None]
    assert phase["reinit"]["items"]["enum"] == list(REINIT)
    rules = {(seam, rule["if"]["properties"][seam]["const"]): rule["then"]
             for rule in moe["allOf"] for seam in rule["if"]["properties"]}  # fmt: skip
    for seam, methods in SEAMS.items():
        for name, method in methods.items():
            options = rules[seam, name]["properties"][f"{seam}_options"]
            assert options["properties"].keys() == default_options(method).keys()
            for option, entry in options["properties"].items():
                assert entry.get("description"), f"{seam} {name}: option {option} has no comment on its line"


def test_schema_refuses_an_option_of_another_choice() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    for seam, methods in SEAMS.items():
        for name in methods:
            assert list(validator.iter_errors({"moe": {seam: name, f"{seam}_options": {"nobody": 1}}}))
            assert not list(validator.iter_errors({"moe": {seam: name}}))


def test_comments_of_fields() -> None:
    from taskmoe.train import config as module

    comments = field_comments(module)
    assert comments["MixingConfig", "max_epochs"] == "strategy: unimax"
    assert ("Config", "seed") not in comments
