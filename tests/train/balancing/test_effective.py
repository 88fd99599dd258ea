from __future__ import annotations

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.effective import corrected_twice, effective_weights

RATES = torch.tensor([0.5, 0.25, 0.25, 0.0])
WEIGHTS = torch.tensor([1.0, 2.0, 1.0, 1.0])


def test_effective_weights_multiply() -> None:
    combination_T = torch.tensor([1.0, 3.0, 0.5, 0.0])
    assert effective_weights(RATES, WEIGHTS).tolist() == [0.5, 0.5, 0.25, 0.0]
    assert effective_weights(RATES, WEIGHTS, combination_T).tolist() == [0.5, 1.5, 0.125, 0.0]


def test_the_first_factor_follows_the_reduction() -> None:
    tokens_T = torch.tensor([2.0, 4.0, 8.0, 1.0])
    ones_T = torch.ones(4)
    by_tokens_T = effective_weights(RATES, ones_T, tokens_T=tokens_T)
    assert by_tokens_T.tolist() == [0.25, 0.25, 0.5, 0.0]
    assert effective_weights(RATES, ones_T, reduction="sample", tokens_T=tokens_T).tolist() == RATES.tolist()
    by_task_T = effective_weights(RATES, ones_T, reduction="task", tokens_T=tokens_T)
    assert by_task_T.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    with pytest.raises(ConfigError, match="loss_reduction: 'mean' is none of token, task, sample"):
        effective_weights(RATES, ones_T, reduction="mean")


@pytest.mark.parametrize(
    "settings",
    [
        {"mixing": "proportional", "reduction": "token"},
        {"mixing": "unimax", "reduction": "token"},
        {"mixing": "explicit", "reduction": "task"},
        {"mixing": "proportional", "reduction": "token", "balancing": "coba", "surgery": "pcgrad"},
        {"mixing": "unimax", "reduction": "sample", "balancing": "fixed", "surgery": "random"},
        {"mixing": "unimax", "reduction": "token", "task_weights": {"a": 1.0}},
    ],
)
def test_one_correction_is_silent(settings: dict) -> None:
    assert corrected_twice(**settings) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mixing": "unimax", "reduction": "task"}, ["mixing.strategy: unimax", "loss_reduction: task"]),
        ({"mixing": "temperature", "reduction": "token", "balancing": "dwa"},
         ["mixing.strategy: temperature", "balancing.method: dwa"]),
        ({"mixing": "equal", "reduction": "token", "task_weights": {"a": 2.0}},
         ["mixing.strategy: equal", "task_weights"]),
        ({"mixing": "capped", "reduction": "task", "surgery": "imtl_g"},
         ["3 settings", "mixing.strategy: capped", "loss_reduction: task", "surgery.method: imtl_g"]),
    ],
)  # fmt: skip
def test_two_corrections_are_named(settings: dict, named: list[str]) -> None:
    sentence = corrected_twice(**settings)
    assert sentence is not None
    assert all(part in sentence for part in named)
    assert "their effects multiply" in sentence
