from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from taskmoe.kernels import configs
from taskmoe.kernels.configs import Key, Launch, launch


@pytest.fixture
def override_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write overrides that the next launch reads."""
    path = tmp_path / "kernels.json"
    monkeypatch.setenv("TASKMOE_KERNEL_CONFIGS", str(path))
    configs.overrides.cache_clear()

    def write(text: str) -> Path:
        path.write_text(text, encoding="utf-8")
        configs.overrides.cache_clear()
        return path

    yield write
    configs.overrides.cache_clear()


def test_every_line_once_and_a_launch_for_each() -> None:
    lines = list(configs.keys())
    assert len(set(map(str, lines))) == len(lines) == 3 * 4 * 2 * 3
    for line in lines:
        found = configs.default(line)
        for number in (found.width, found.num_warps):
            assert number >= 1 and not number & (number - 1), line
        assert found.width >= configs.MIN_TILE and found.num_stages >= 1
        # wgrad sums over the rows of a step: no fewer than a product takes.
        assert found.rows >= configs.MIN_TILE if line.kernel == "wgrad" else found.rows == 0
    for arch, line in configs.TABLE:
        assert arch in configs.ARCHITECTURES and line in lines


@pytest.mark.parametrize(
    ("R", "bucket"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (128, 128), (1000, 128)]
)
def test_columns_go_into_the_least_tile_that_holds_them(R: int, bucket: int) -> None:
    assert configs.rank_bucket(R) == bucket
    assert configs.key("shrink", R, 2048, 16) == Key("shrink", bucket, "narrow", 16)
    assert configs.key("shrink", R, 2049, 16) == Key("shrink", bucket, "wide", 16)
    assert configs.expand_columns(R, 16) == min(bucket, 32)
    assert configs.expand_columns(R, 32) == configs.expand_columns(R, 64) == 16


@pytest.mark.parametrize(("r", "D"), [(1, 1), (1, 100), (3, 4096), (16, 4096), (33, 4096), (512, 7)])
def test_a_tile_of_reduce_holds_every_row_of_an_expert(r: int, D: int) -> None:
    rows, width = configs.reduce_tile(r, D)
    assert r <= rows < 2 * r or rows == r == 1
    assert width & (width - 1) == 0 and 16 <= width <= 512
    assert rows * width <= max(4096, 16 * rows)


def test_the_table_stands_before_the_default(override_file) -> None:
    line = Key("shrink", 128, "wide", 16)
    assert launch("sm_90", "some GPU", "shrink", 128, 4096, 16) == configs.TABLE["sm_90", line]
    assert configs.TABLE["sm_90", line] != configs.default(line)


def test_an_unknown_gpu_takes_the_defaults(override_file) -> None:
    for line in configs.keys():  # noqa: SIM118
        D = {"narrow": 2048, "wide": 8192}[line.width]
        assert launch(
            "sm_999", "a GPU of the future", line.kernel, line.rank, D, line.bits
        ) == configs.default(line)


def test_no_launch_is_wider_than_the_tensor(override_file) -> None:
    default = configs.default(Key("expand", 16, "narrow", 16))
    for D, width in ((1, 16), (16, 16), (17, 32), (100, 128), (255, 256), (2048, default.width)):
        found = launch("", "", "expand", 4, D, 16)
        assert found == Launch(width, default.rows, default.num_warps, default.num_stages)


def test_an_override_stands_before_the_table_on_its_gpu_alone(override_file) -> None:
    override_file(json.dumps({"GPU A": {"shrink/128/wide/16": [32, 0, 2, 5]}}))
    assert launch("sm_90", "GPU A", "shrink", 100, 4096, 16) == Launch(32, 0, 2, 5)
    assert (
        launch("sm_90", "GPU B", "shrink", 100, 4096, 16)
        == configs.TABLE["sm_90", Key("shrink", 128, "wide", 16)]
    )
    assert launch("sm_90", "GPU A", "shrink", 16, 4096, 16) == configs.default(Key("shrink", 16, "wide", 16))


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[1, 2]",
        '{"GPU": 3}',
        '{"GPU": {"shrink/17/wide/16": [32, 0, 2, 5]}}',
        '{"GPU": {"shrink/16/wide/16": [33, 0, 2, 5]}}',
        '{"GPU": {"shrink/16/wide/16": [32, 0, 3, 5]}}',
        '{"GPU": {"shrink/16/wide/16": [32, 0, 4, 0]}}',
        '{"GPU": {"shrink/16/wide/16": [32, 0, 4]}}',
        '{"GPU": {"shrink/16/wide/16": [32, 0, "4", 1]}}',
        '{"GPU": {"shrink/16/wide/16": 32}}',
    ],
)
def test_a_broken_file_is_one_warning_and_the_defaults(override_file, text: str) -> None:
    path = override_file(text)
    with pytest.warns(UserWarning, match="not a file of kernel configurations") as caught:
        for _ in range(3):
            assert launch("sm_80", "GPU", "shrink", 16, 4096, 16) == configs.default(
                Key("shrink", 16, "wide", 16)
            )
    assert len(caught) == 1 and str(path) in str(caught[0].message)


def test_reading_says_what_is_wrong(override_file) -> None:
    with pytest.raises(ValueError, match="'shrink/17/wide/16' is no line of the table"):
        configs.read_overrides(override_file('{"GPU": {"shrink/17/wide/16": [32, 0, 2, 5]}}'))
    with pytest.raises(
        ValueError, match=r"shrink/16/wide/16: \[33, 0, 2, 5\]; width .and rows, of wgrad. are powers of two"
    ):
        configs.read_overrides(override_file('{"GPU": {"shrink/16/wide/16": [33, 0, 2, 5]}}'))


@pytest.mark.parametrize(
    "values", [[8, 32, 4, 2], [64, 0, 4, 2], [64, 48, 4, 2], [64, 32, 3, 2], [64, 32, 4, 0]]
)
def test_a_launch_that_no_kernel_takes_is_refused(override_file, values) -> None:
    with pytest.raises(ValueError, match=r"wgrad/16/wide/16: .*powers of two"):
        configs.read_overrides(override_file(f'{{"GPU": {{"wgrad/16/wide/16": {values}}}}}'))


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TASKMOE_KERNEL_CONFIGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.override_file() == tmp_path / "taskmoe" / "kernels.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert configs.override_file() == Path.home() / ".cache" / "taskmoe" / "kernels.json"
    configs.overrides.cache_clear()
    monkeypatch.setenv("TASKMOE_KERNEL_CONFIGS", str(tmp_path / "none.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.overrides() == {}
    configs.overrides.cache_clear()
