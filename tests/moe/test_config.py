"""TaskMoEConfig as a dict: there and back, aliases, unknown keys."""

from __future__ import annotations

import dataclasses
import json

import pytest

from taskmoe.moe import ConfigError, TaskMoEConfig


def test_there_and_back_through_json():
    config = TaskMoEConfig(r=2, target_modules=("q", "v"), layers_to_transform=(0, 2), rank_pattern={"q": 3},
                           modules_to_save=("head",), gate="top_k", top_k=2, lora_alpha=0.5)  # fmt: skip
    assert TaskMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TaskMoEConfig.from_dict({}) == TaskMoEConfig()


def test_pefts_names_for_poly_are_aliases():
    assert TaskMoEConfig.from_dict({"n_skills": 5, "n_splits": 2}) == TaskMoEConfig(
        num_experts=5, num_heads=2
    )
    with pytest.raises(ConfigError, match=r"moe\.n_skills: num_experts is given twice, as 4 and 5; keep one"):
        TaskMoEConfig.from_dict({"num_experts": 4, "n_skills": 5})


def test_an_unknown_setting_is_named():
    with pytest.raises(ConfigError, match=r"moe\.num_expert: unknown setting; .*num_experts"):
        TaskMoEConfig.from_dict({"num_expert": 4})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TaskMoEConfig().r = 3
