"""Learning-rate factors against transformers' own; phases against hand-made ones."""

from __future__ import annotations

import dataclasses

import pytest

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.train.config import Config, ConfigError, DatasetConfig, MixingConfig, PhaseConfig
from taskmoe.train.schedule import (
    GROUPS,
    SCHEDULES,
    learning_rates,
    lr_factor,
    phase_at,
    resolve_phases,
    warmup_steps,
)


def run(*phases: PhaseConfig, **settings: object) -> Config:
    return Config(max_steps=100, phases=phases or (PhaseConfig(),), **settings)


@pytest.mark.parametrize(
    "ours, theirs", [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup, total", [(0, 20), (1, 20), (7, 20), (20, 20)])
def test_factors_equal_transformers(ours: str, theirs: str, warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = get_scheduler(theirs, optimiser, warmup, total).lr_lambdas[0]
    for step in range(total + 3):
        if ours == "cosine" and step > total:
            continue  # theirs comes up again past the end
        assert SCHEDULES[ours](step, total, warmup) == pytest.approx(factor(step), abs=1e-12), step


def test_factors_stay_at_their_end() -> None:
    assert SCHEDULES["linear"](25, 20, 3) == SCHEDULES["cosine"](25, 20, 3) == 0.0
    assert SCHEDULES["constant"](25, 20, 3) == 1.0


def test_warmup_in_steps_or_as_a_share() -> None:
    assert warmup_steps(Config(warmup_ratio=0.03), 110) == 4  # rounded up, as transformers does
    assert warmup_steps(Config(warmup_ratio=0.0), 110) == 0
    assert warmup_steps(Config(warmup_steps=7), 110) == 7
    assert warmup_steps(Config(warmup_steps=7), 5) == 5


def test_one_phase_takes_the_run_as_it_is() -> None:
    (phase,) = resolve_phases(run(learning_rate=2e-3, moe=TaskMoEConfig(router_temperature=0.7)))
    assert (phase.start, phase.end, phase.steps, phase.name) == (0, 100, 100, "main")
    assert phase.train == ("experts", "router", "task_embedding", "heads", "saved")
    assert phase.mixing == MixingConfig()
    assert phase.router_temperature == (0.7, 0.7) and phase.temperature(50) == 0.7
    assert phase.learning_rates == pytest.approx(
        {"base": 2e-3, "experts": 2e-3, "router": 2e-2, "task_embedding": 2e-2, "heads": 2e-3, "saved": 2e-3}
    )
    assert set(phase.learning_rates) == set(GROUPS)


def test_phases_follow_each_other_and_one_takes_the_rest() -> None:
    phases = resolve_phases(
        run(PhaseConfig("a", steps=30), PhaseConfig("b"), PhaseConfig("c", steps=20)),
    )
    assert [(p.name, p.start, p.end) for p in phases] == [("a", 0, 30), ("b", 30, 80), ("c", 80, 100)]
    assert [phase_at(phases, s).name for s in (0, 29, 30, 79, 80, 99, 100, 500)] == list("aabbcccc")


@pytest.mark.parametrize(
    "phases, message",
    [
        ((PhaseConfig(steps=30), PhaseConfig(steps=60)), "add up to 90, but max_steps is 100"),
        ((PhaseConfig(steps=30), PhaseConfig(steps=80)), "add up to 110, but max_steps is 100"),
        ((PhaseConfig(), PhaseConfig()), r"2 phases have no steps \(0, 1\)"),
        ((PhaseConfig(steps=100), PhaseConfig()), "phases.1.steps: nothing is left"),
        ((PhaseConfig(train=()),), "phases.0.train: the phase trains nothing"),
        ((PhaseConfig(train=("expert",)),), "phases.0.train: 'expert' is not one of base, experts"),
        ((PhaseConfig(adapters=False),), "phases.0.train: experts, router, task_embedding cannot train"),
    ],
    ids=str,
)
def test_phases_that_do_not_fit(phases: tuple[PhaseConfig, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_phases(run(*phases))


def test_a_run_may_have_no_steps() -> None:
    (phase,) = resolve_phases(Config(max_steps=0))
    assert (phase.start, phase.end, phase.schedule_end) == (0, 0, 0) and phase_at([phase], 0) is phase
    with pytest.raises(ConfigError, match="phases: their steps add up to 5, but max_steps is 0"):
        resolve_phases(Config(max_steps=0, phases=(PhaseConfig(steps=5),)))
    with pytest.raises(ConfigError, match=r"phases\.1\.steps: nothing is left"):
        resolve_phases(Config(max_steps=0, phases=(PhaseConfig(steps=5), PhaseConfig())))


def test_no_phase_at_all() -> None:
    with pytest.raises(ConfigError, match="phases: the list is empty"):
        resolve_phases(Config(phases=()))


@pytest.mark.parametrize(
    "of_run, of_phase, expected",
    [
        ({}, {}, {"base": 1e-3, "router": 1e-2, "task_embedding": 1e-2}),
        ({}, {"learning_rate": 5e-4}, {"base": 5e-4, "experts": 5e-4, "router": 5e-3, "heads": 5e-4}),
        ({"router_learning_rate": 0.1}, {"learning_rate": 5e-4}, {"router": 0.1, "task_embedding": 0.1}),
        (
            {"router_learning_rate": 0.1},
            {"router_learning_rate": 0.2},
            {"router": 0.2, "task_embedding": 0.2},
        ),
        (
            {"task_embedding_learning_rate": 0.3},
            {"router_learning_rate": 0.2},
            {"router": 0.2, "task_embedding": 0.3},
        ),
        ({"base_learning_rate": 1e-5}, {}, {"base": 1e-5, "experts": 1e-3}),
        ({"base_learning_rate": 1e-5}, {"base_learning_rate": 2e-5}, {"base": 2e-5}),
        ({"router_learning_rate": 0.1}, {"router_learning_rate": 0.0}, {"router": 0.0}),
    ],
)
def test_learning_rates_of_groups(of_run: dict, of_phase: dict, expected: dict[str, float]) -> None:
    (phase,) = resolve_phases(run(PhaseConfig(**of_phase), **of_run))
    assert {group: phase.learning_rates[group] for group in expected} == pytest.approx(expected)


def test_groups_that_do_not_train_have_rate_zero() -> None:
    config = run(
        PhaseConfig("base", steps=40, train=("base",), adapters=False),
        PhaseConfig("experts"),
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
    )
    phases = resolve_phases(config)
    assert {g for g, rate in learning_rates(config, phases, 10).items() if rate} == {"base"}
    assert {g for g, rate in learning_rates(config, phases, 40).items() if rate} == set(GROUPS) - {"base"}
    assert learning_rates(config, phases, 40)["router"] == pytest.approx(1e-2)


def test_one_schedule_over_the_run_unless_restarted() -> None:
    def factors(*restarts: bool) -> list[float]:
        config = run(
            PhaseConfig(steps=20),
            *(PhaseConfig(steps=40, restart_schedule=r) for r in restarts),
            warmup_steps=10,
        )
        phases = resolve_phases(config)
        return [lr_factor(config, phase_at(phases, s), s) for s in range(100)]

    whole = [SCHEDULES["linear"](s, 100, 10) for s in range(100)]
    assert factors(False, False) == whole
    assert factors(True, False) == [SCHEDULES["linear"](s, 20, 10) for s in range(20)] + [
        SCHEDULES["linear"](s, 80, 10) for s in range(80)
    ]
    assert factors(False, True)[:60] == [SCHEDULES["linear"](s, 60, 10) for s in range(60)]
    assert factors(False, True)[60:] == [SCHEDULES["linear"](s, 40, 10) for s in range(40)]


def test_temperature_runs_from_the_first_step_to_the_last() -> None:
    first, second = resolve_phases(
        run(PhaseConfig(steps=50), PhaseConfig(router_temperature=(2.0, 0.5))),
    )
    assert first.temperature(0) == first.temperature(49) == 1.0
    assert second.temperature(50) == 2.0 and second.temperature(99) == 0.5
    assert second.temperature(74) == pytest.approx(2.0 - 1.5 * 24 / 49)
    assert second.temperature(10) == 2.0 and second.temperature(200) == 0.5
    (exponential,) = resolve_phases(
        run(PhaseConfig(router_temperature=(300.0, 1.0), router_temperature_schedule="exponential"))
    )
    assert exponential.temperature(0) == 300.0 and exponential.temperature(99) == 1.0
    for step in (1, 50):
        factor = exponential.temperature(step) / exponential.temperature(step - 1)
        assert factor == pytest.approx(300 ** (-1 / 99))
    one_step = dataclasses.replace(second, end=second.start + 1)
    assert one_step.temperature(one_step.start) == 2.0


def test_a_phase_has_its_own_mixture_or_the_runs() -> None:
    own = MixingConfig(strategy="equal")
    first, second = resolve_phases(
        run(PhaseConfig(steps=50, mixing=own), PhaseConfig(), mixing=MixingConfig(strategy="proportional"))
    )
    assert first.mixing == own and second.mixing.strategy == "proportional"


def test_explicit_weights_may_stand_beside_the_datasets() -> None:
    datasets = (
        DatasetConfig(name="a", path="a.jsonl", weight=2.0),
        DatasetConfig(name="b", path="b.jsonl", weight=1.0),
    )
    mixing = MixingConfig(strategy="explicit")
    (phase,) = resolve_phases(run(datasets=datasets, mixing=mixing))
    assert phase.mixing.weights == {"a": 2.0, "b": 1.0}
    given = MixingConfig(strategy="explicit", weights={"a": 1.0})
    (phase,) = resolve_phases(run(datasets=datasets, mixing=given))
    assert phase.mixing.weights == {"a": 1.0}
