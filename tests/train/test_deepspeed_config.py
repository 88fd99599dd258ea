"""What the engine is given: "auto" filled in, contradictions and other people's jobs refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskmoe.train.config import Config, ConfigError
from taskmoe.train.deepspeed_config import build, read

SHIPPED = Path(__file__).parents[2] / "configs" / "deepspeed"
CONFIG = Config(per_device_train_batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0.5)


@pytest.fixture
def write(tmp_path: Path):
    def write_json(content: Any) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_json


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_are_complete_and_accepted_by_deepspeed(stage: int) -> None:
    built = build(CONFIG, 2, SHIPPED / f"zero{stage}.json")
    assert built["train_micro_batch_size_per_gpu"] == 4
    assert built["gradient_accumulation_steps"] == 1  # ours is outside the engine
    assert built["train_batch_size"] == 8
    assert built["gradient_clipping"] == 0.5
    assert built["zero_allow_untested_optimizer"] is True
    assert built["zero_optimization"]["stage"] == stage
    assert "auto" not in json.dumps(built)
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    parsed = zero_config.DeepSpeedZeroConfig(**built["zero_optimization"])  # unknown keys raise
    assert parsed.stage == stage


def test_without_a_file_it_is_zero_0_and_clipping_is_still_written() -> None:
    built = build(Config(max_grad_norm=0.0), 1)
    assert built["zero_optimization"] == {"stage": 0}
    assert built["gradient_clipping"] == 0.0
    assert built["steps_per_print"] > 10**6 and built["wall_clock_breakdown"] is False


def test_what_the_file_sets_is_kept(write) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"}
    built = build(CONFIG, 2, write({"zero_optimization": zero, "steps_per_print": 7}))
    assert built["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert built["zero_optimization"]["reduce_bucket_size"] == 10_000_000
    assert built["steps_per_print"] == 7
    assert "zero_force_ds_cpu_optimizer" not in built


def test_offload_works_with_torchs_optimiser(write) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert build(CONFIG, 1, write({"zero_optimization": zero}))["zero_force_ds_cpu_optimizer"] is False


def test_numbers_that_agree_are_accepted(write) -> None:
    path = write(
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "train_batch_size": 24}
    )
    built = build(CONFIG, 2, path)
    assert built["gradient_accumulation_steps"] == 1 and built["train_batch_size"] == 8


@pytest.mark.parametrize(
    "content, message",
    [
        ({"optimizer": {"type": "AdamW"}}, r"optimizer: .*`optim: adamw_torch`"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: .*`lr_scheduler_type`"),
        ({"bf16": {"enabled": True}}, r"bf16: .*`bf16: true` in the YAML"),
        ({"fp16": {"enabled": True}}, r"fp16: .*`bf16: true` in the YAML"),
        ({"amp": {"enabled": True}}, "amp: "),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu: 2 is not 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2 is not 3"),
        ({"train_batch_size": 8}, r"train_batch_size: 8 is not 24 \(4 sequences x 2 ranks x 3 accumulated\)"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping: 1\.0 is not 0\.5 \(max_grad_norm: 0\.5\)"),
        ({"zero_optimization": {"stage": 4}}, "stage: 4 is not one of 0, 1, 2, 3"),
        ({"zero_optimization": 2}, "zero_optimization: expected an object"),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": "auto"}},
            'round_robin_gradients: "auto"',
        ),
        ({"comms_logger": {"enabled": "auto"}}, r"comms_logger\.enabled: \"auto\""),
        ("[1]", "expected a JSON object, found list"),
        ('{\n "zero": ]\n}', r"ds\.json:2:10: not JSON"),
    ],
    ids=lambda v: (v if isinstance(v, str) else json.dumps(v))[:40],
)
def test_refused(write, content: Any, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError, match=message) as caught:
        build(CONFIG, 2, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("section", ["bf16", "fp16", "amp"])
@pytest.mark.parametrize("enabled", [False, "auto"])
def test_switched_off_sections_are_dropped(write, section: str, enabled: object) -> None:
    assert section not in build(CONFIG, 1, write({section: {"enabled": enabled}}))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "zero1.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"zero1json.*nearest is .*zero1\.json"):
        read(tmp_path / "zero1json")
    with pytest.raises(ConfigError, match="configs/deepspeed/ has one for each stage"):
        read(tmp_path / "nowhere" / "zero1.json")
