"""Rates against their definitions; the sampler's stream against what makes it resumable and fair."""

from __future__ import annotations

import json
import math

import pytest

from taskmoe.train.config import ConfigError, MixingConfig
from taskmoe.train.mixing import MIXTURES, MixtureSampler, excess, expected_epochs, rates

SIZES = [4000, 1000, 200, 20]
NAMES = ["big", "middle", "small", "tiny"]


def shares(budget: int = 5000, drawn: list[int] | None = None, **settings: object) -> list[float]:
    return rates(MixingConfig(**settings), SIZES, NAMES, budget, drawn)


def normalised(values: list[float]) -> list[float]:
    return [v / sum(values) for v in values]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"strategy": "proportional"}, [4000, 1000, 200, 20]),
        ({"strategy": "equal"}, [1, 1, 1, 1]),
        ({"strategy": "capped", "cap": 500}, [500, 500, 200, 20]),
        ({"strategy": "temperature", "temperature": 2.0}, [math.sqrt(n) for n in SIZES]),
        (
            {"strategy": "temperature", "temperature": 2.0, "cap": 900},
            [30, 30, math.sqrt(200), math.sqrt(20)],
        ),
        ({"strategy": "temperature", "temperature": 1.0}, [4000, 1000, 200, 20]),
        ({"strategy": "explicit", "weights": {"tiny": 3.0, "big": 1.0}}, [1, 0, 0, 3]),
        # tiny takes 4 x 20, small 4 x 200, the other two share what is left of 5000
        ({"strategy": "unimax", "max_epochs": 4.0}, [2060, 2060, 800, 80]),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_rates(settings: dict, expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(normalised(expected), rel=1e-12)


@pytest.mark.parametrize("strategy", MIXTURES)
def test_rates_sum_to_one_and_skip_empty_tasks(strategy: str) -> None:
    config = MixingConfig(strategy=strategy, cap=50, weights={"a": 1.0, "c": 2.0})
    got = rates(config, [10, 0, 1000], ["a", "b", "c"], 100)
    assert math.fsum(got) == pytest.approx(1.0)
    assert got[1] == 0.0 and got[0] > 0 and got[2] > 0


@pytest.mark.parametrize("budget", [1, 10, 100, 1000, 5000, 20000])
@pytest.mark.parametrize("max_epochs", [0.5, 1.0, 4.0])
def test_unimax_bounds_repeats_and_wastes_nothing(budget: int, max_epochs: float) -> None:
    config = MixingConfig(max_epochs=max_epochs)
    got = rates(config, SIZES, NAMES, budget)
    epochs = expected_epochs(got, SIZES, budget)
    over = excess(config, SIZES, NAMES, budget)
    if over == 0:
        assert max(epochs) <= max_epochs * (1 + 1e-12)
        below = [r for r, e in zip(got, epochs, strict=True) if e < max_epochs * (1 - 1e-9)]
        assert below == pytest.approx([max(got)] * len(below))  # not at the bound: the largest share
    else:  # the bound cannot hold: all are repeated alike, by the factor the excess names
        assert over == math.ceil(budget - max_epochs * sum(SIZES))
        assert epochs == pytest.approx([budget / sum(SIZES)] * len(SIZES))


def test_unimax_counts_what_earlier_phases_drew() -> None:
    # tiny has had 60 of its 80, small all of its 800
    got = shares(budget=1000, drawn=[0, 0, 800, 60], strategy="unimax")
    assert got == pytest.approx([0.49, 0.49, 0.0, 0.02])
    config = MixingConfig(max_epochs=1.0)
    assert excess(config, SIZES, NAMES, 1000, drawn=SIZES) == 1000
    fresh = rates(config, SIZES, NAMES, 1000)
    assert rates(config, SIZES, NAMES, 1000, drawn=SIZES) == fresh  # another round


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "unimx"}, "mixing.strategy: 'unimx'.*nearest is 'unimax'"),
        ({"strategy": "capped"}, "mixing.cap"),
        ({"strategy": "temperature", "temperature": 0.0}, "mixing.temperature: 0.0"),
        ({"strategy": "unimax", "max_epochs": 0.0}, "mixing.max_epochs: 0.0"),
        ({"strategy": "explicit"}, "mixing.weights.*positive weight"),
        ({"strategy": "explicit", "weights": {"tinny": 1.0}}, "mixing.weights.tinny.*tiny"),
        ({"strategy": "explicit", "weights": {"tiny": -1.0}}, "mixing.weights.tiny: -1.0"),
        ({"strategy": "explicit", "weights": {"tiny": math.nan}}, "mixing.weights.tiny: nan"),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_unusable_settings(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares(**settings)


def test_no_rows_and_weight_on_an_empty_task() -> None:
    with pytest.raises(ConfigError, match="no task has a training row"):
        rates(MixingConfig(), [0, 0], ["a", "b"], 10)
    with pytest.raises(ConfigError, match=r"mixing.weights.b: the task has no training rows"):
        rates(MixingConfig(strategy="explicit", weights={"b": 1.0}), [5, 0], ["a", "b"], 10)


def test_frequencies_are_those_of_the_rates() -> None:
    mix = [0.5, 0.3, 0.15, 0.0499, 0.0001]
    n = 20000
    drawn = MixtureSampler([1000] * 5, mix, seed=1).draw(n)
    for task, rate in enumerate(mix):
        count = sum(1 for t, _ in drawn if t == task)
        assert abs(count - n * rate) <= 4.5 * math.sqrt(n * rate * (1 - rate)) + 1, task


def test_every_epoch_is_a_permutation_and_epochs_differ() -> None:
    sampler = MixtureSampler([7, 30], [0.3, 0.7], seed=3)
    rows: list[list[int]] = [[], []]
    for task, row in sampler.draw(600):
        rows[task].append(row)
    for size, stream in zip([7, 30], rows, strict=True):
        epochs = [tuple(stream[i : i + size]) for i in range(0, len(stream) - size, size)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > 1
    assert sampler.epochs() == [len(rows[0]) / 7, len(rows[1]) / 30]


def test_tasks_of_one_size_have_different_orders_and_seeds_differ() -> None:
    def walk(seed: int, task: int) -> list[int]:
        mix = [float(t == task) for t in range(2)]
        return [row for _, row in MixtureSampler([50, 50], mix, seed).draw(50)]

    assert walk(0, 0) != walk(0, 1)
    assert walk(0, 0) != walk(1, 0)
    assert walk(0, 0) == walk(0, 0)
    first, second = (MixtureSampler([9, 9], [0.5, 0.5], seed).draw(64) for seed in (0, 1))
    assert [t for t, _ in first] != [t for t, _ in second]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 64])
def test_the_stream_does_not_depend_on_how_it_is_drawn(chunk: int) -> None:
    whole = MixtureSampler([5, 11, 3], [0.2, 0.5, 0.3], seed=7).draw(120)
    sampler = MixtureSampler([5, 11, 3], [0.2, 0.5, 0.3], seed=7)
    pieces = [pair for _ in range(0, 120, chunk) for pair in sampler.draw(chunk)]
    assert pieces[:120] == whole


@pytest.mark.parametrize("cut", [0, 1, 5, 33, 100])
def test_resume_at_any_point(cut: int) -> None:
    sizes, mix = [5, 11, 3], [0.2, 0.5, 0.3]
    whole = MixtureSampler(sizes, mix, seed=7).draw(150)
    first = MixtureSampler(sizes, mix, seed=7)
    head = first.draw(cut)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 200  # small: no permutation in it
    second = MixtureSampler(sizes, [1.0, 0.0, 0.0], seed=7)  # rates come from the state
    second.load_state_dict(state)
    assert head + second.draw(150 - cut) == whole
    assert second.state_dict()["position"] == 150


def test_new_rates_keep_each_tasks_walk() -> None:
    one, two = MixtureSampler([20, 20], [0.9, 0.1], seed=2), MixtureSampler([20, 20], [0.5, 0.5], seed=2)
    stream = one.draw(30)
    one.set_rates([0.0, 1.0])
    stream += one.draw(30)
    assert all(task == 1 for task, _ in stream[30:])
    for task in range(2):  # the walk of a task is the same whatever the rates were
        walk = [row for t, row in stream if t == task]
        other = [row for t, row in two.draw(200) if t == task] if task == 0 else None
        two = MixtureSampler([20, 20], [0.5, 0.5], seed=2)
        expected = other or [row for t, row in two.draw(200) if t == task]
        assert walk == expected[: len(walk)]


def test_a_state_continues_with_tasks_appended() -> None:
    old = MixtureSampler([5, 7], [0.5, 0.5], seed=0)
    old.draw(9)
    new = MixtureSampler([5, 7, 4], [0.0, 0.0, 1.0], seed=0)
    new.load_state_dict(old.state_dict())
    assert new.drawn == [*old.drawn, 0]
    assert sorted(row for _, row in new.draw(4)) == [0, 1, 2, 3]


def test_a_state_of_other_data_or_seed_is_refused() -> None:
    state = MixtureSampler([5, 7], [0.5, 0.5], seed=0).state_dict()
    with pytest.raises(ConfigError, match=r"tasks of \[5, 7\] rows.*\[5, 8\]"):
        MixtureSampler([5, 8], [0.5, 0.5], seed=0).load_state_dict(state)
    with pytest.raises(ConfigError, match="seed 0, this run has 1"):
        MixtureSampler([5, 7], [0.5, 0.5], seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    "bad, message",
    [
        ([1.0], "1 rates for 2 tasks"),
        ([0.0, 0.0], "every rate is zero"),
        ([0.5, -0.5], "task 1 is -0.5"),
        ([0.5, math.inf], "task 1 is inf"),
    ],
)
def test_bad_rates(bad: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureSampler([5, 5], bad, seed=0)
    with pytest.raises(ConfigError, match=r"task 1 has the rate 0\.5 but no rows"):
        MixtureSampler([5, 0], [0.5, 0.5], seed=0)


def test_first_draws_are_pinned() -> None:
    """A checkpoint of today must resume with the numpy of tomorrow."""
    assert MixtureSampler([6, 3], [0.6, 0.4], seed=42).draw(8) == PINNED


PINNED = [(1, 2), (0, 4), (1, 0), (0, 5), (0, 3), (0, 0), (0, 2), (0, 1)]
