"""``taskmoe compare``: arms, differences and intervals by hand, what is left out and said, the files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from scipy import stats

from taskmoe.train import cli
from taskmoe.train.comparison import compare_runs
from taskmoe.train.comparison_view import as_html, as_markdown, plot
from taskmoe.train.track.facts import FactsError

GATES = {"all": torch.rand(2, 1, 3)}
CONFIG = "model: {type: llama}\nmoe: {router: ROUTER}\nseed: SEED\noutput_dir: runs/ROUTER-SEED\n"


@pytest.fixture
def arm(make_run: Callable[..., Path]) -> Callable[..., str]:
    """``arm(router, seed, scores)``: a finished run."""

    def make(
        router: str, seed: int, scores: Mapping[str, float] | None, name: str = "", more: str = ""
    ) -> str:
        config = CONFIG.replace("ROUTER", router).replace("SEED", str(seed)) + more
        path = make_run(name or f"{router}-s{seed}", GATES, groups=(None, None), scores=scores, config=config)
        return str(path)

    return make


@pytest.fixture
def two_arms(arm: Callable[..., str]) -> list[str]:
    """Three seeds of each."""
    base = [{"a": 0.5, "b": 0.2}, {"a": 0.6, "b": 0.4}, {"a": 0.7, "b": 0.3}]
    other = [{"a": 0.6, "b": 0.1}, {"a": 0.8, "b": 0.4}, {"a": 0.7, "b": 0.1}]
    return [arm("table", s, x) for s, x in enumerate(base)] + [arm("mlp", s, x) for s, x in enumerate(other)]


def test_runs_that_differ_in_the_seed_are_one_arm(two_arms: list[str]) -> None:
    found = compare_runs(two_arms)
    base, other = found["arms"]
    assert (base["name"], base["seeds"], base["runs"]) == ("table", [0, 1, 2], two_arms[:3])
    assert (other["name"], other["shared_seeds"], other["runs"]) == ("mlp", [0, 1, 2], two_arms[3:])
    assert base["differs"] == {} and other["differs"] == {"moe.router": ["table", "mlp"]}
    assert base["mean"]["values"] == pytest.approx([0.35, 0.5, 0.5])
    assert base["difference"] is None and base["relative_gain"] is None
    assert found["remarks"] == [] and found["baseline"] == "table"


def test_differences_and_intervals_by_hand(two_arms: list[str]) -> None:
    found = compare_runs(two_arms)
    a, b = found["tasks"]
    assert (a["name"], a["metric"], b["name"]) == ("a", "exact_match", "b")
    cell = a["arms"][1]
    assert cell["values"] == [0.6, 0.8, 0.7] and cell["mean"] == pytest.approx(0.7)
    # Differences 0.1, 0.2, 0.0: mean 0.1, standard deviation 0.1; t(0.975) of 2 degrees of freedom 4.303.
    assert cell["difference"] == pytest.approx(0.1)
    assert cell["low"] == pytest.approx(0.1 - 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert cell["high"] == pytest.approx(0.1 + 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert cell["relative"] == pytest.approx(0.1 / 0.6)
    assert b["arms"][1]["difference"] == pytest.approx(-0.1) and a["arms"][0]["difference"] is None
    gain = found["arms"][1]["relative_gain"]
    assert gain["value"] == pytest.approx((0.1 / 0.6 - 0.1 / 0.3) / 2)
    assert (gain["tasks"], gain["left_out"]) == (2, [])
    per_seed = [(0.1 / 0.6 - 0.1 / 0.3) / 2, (0.2 / 0.6 + 0.0) / 2, (0.0 - 0.2 / 0.3) / 2]
    interval = stats.ttest_1samp(per_seed, 0.0).confidence_interval(0.95)
    assert (gain["low"], gain["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_seeds_are_paired_whatever_their_order(two_arms: list[str]) -> None:
    swapped = compare_runs([*two_arms[:3], *two_arms[:2:-1]])
    assert [task["arms"][1]["low"] for task in swapped["tasks"]] == pytest.approx(
        [task["arms"][1]["low"] for task in compare_runs(two_arms)["tasks"]]
    )


def test_seeds_that_only_one_arm_has_are_not_paired(two_arms: list[str]) -> None:
    found = compare_runs(two_arms[:5])
    cell = found["tasks"][0]["arms"][1]
    assert found["arms"][1]["shared_seeds"] == [0, 1]
    assert cell["difference"] == pytest.approx((0.1 + 0.2) / 2) and cell["low"] is not None
    assert found["tasks"][0]["arms"][0]["mean"] == pytest.approx(0.6)  # over all three
    assert found["remarks"] == ["mlp: differences are over the 2 seeds that table has too"]


@pytest.mark.parametrize("seed, shared", [(0, 1), (5, 0)])
def test_one_seed_has_no_interval(arm: Callable[..., str], seed: int, shared: int) -> None:
    found = compare_runs([arm("table", 0, {"a": 0.5}), arm("mlp", seed, {"a": 0.75})])
    cell = found["tasks"][0]["arms"][1]
    assert (cell["difference"], cell["low"], cell["high"], cell["relative"]) == (0.25, None, None, 0.5)
    assert found["arms"][1]["relative_gain"]["value"] == 0.5
    assert f"no interval, it has {shared} seed(s) in common with table" in found["remarks"][0]


def test_the_same_settings_and_seed_again_are_another_arm(arm: Callable[..., str]) -> None:
    runs = [arm("table", 0, {"a": 0.5}, name) for name in ("monday", "tuesday/monday")]
    found = compare_runs(runs)
    assert [arm["name"] for arm in found["arms"]] == ["monday", "monday (2)"]
    assert found["arms"][1]["differs"] == {}


def test_where_a_run_lies_does_not_make_it_another_arm(arm: Callable[..., str]) -> None:
    runs = [
        arm("table", 0, {"a": 0.5}),
        arm("table", 1, {"a": 0.7}, "other", "run_name: x\ntrack: {max_keys: 3}\n"),
    ]
    (only,) = compare_runs(runs)["arms"]
    assert only["seeds"] == [0, 1] and only["name"] == "table-s0"
    assert only["mean"]["std"] == pytest.approx(0.2 / 2**0.5)


def test_baselines_near_zero_do_not_count_in_the_gain(arm: Callable[..., str]) -> None:
    runs = [arm("table", 0, {"a": 0.5, "b": 0.009}), arm("mlp", 0, {"a": 0.55, "b": 0.9})]
    found = compare_runs(runs)
    gain = found["arms"][1]["relative_gain"]
    assert gain["value"] == pytest.approx(0.1) and gain["left_out"] == ["b"] and gain["tasks"] == 1
    cell = found["tasks"][1]["arms"][1]
    assert cell["relative"] is None and cell["difference"] == pytest.approx(0.891)
    assert any(
        "b not in the average relative gain: the baseline is under 0.01" in r for r in found["remarks"]
    )
    zero = compare_runs([arm("zero", 0, {"a": 0.0}), arm("one", 0, {"a": 1.0})])
    assert zero["arms"][1]["relative_gain"]["value"] is None


def test_medians_and_wins_stand_beside_the_gain(arm: Callable[..., str]) -> None:
    base = {"a": 0.001, "b": 0.2, "c": 0.3, "d": 0.5}
    other = {"a": 0.9, "b": 0.1 + 0.1 + 1e-16, "c": 0.15, "d": 0.55}
    first, second = compare_runs([arm("table", 0, base), arm("mlp", 0, other)])["arms"]
    assert first["median"] == pytest.approx(0.25) and second["median"] == pytest.approx(0.375)
    assert first["wins"] is None and second["wins"] == {"better": 2, "same": 1, "worse": 1}
    gain = second["relative_gain"]  # of b, c and d: 0, -0.5 and 0.1
    assert gain["value"] == pytest.approx(-0.4 / 3) and gain["median"] == pytest.approx(0.0, abs=1e-9)
    assert gain["left_out"] == ["a"]


def test_tasks_that_some_run_lacks(arm: Callable[..., str]) -> None:
    runs = [arm("table", 0, {"a": 0.5, "b": 0.5}), arm("mlp", 0, {"b": 0.75, "c": 0.5})]
    found = compare_runs(runs)
    assert [task["name"] for task in found["tasks"]] == ["b"]
    assert found["remarks"][:2] == ["table-s0 has no task c: left out", "mlp-s0 has no task a: left out"]
    assert found["arms"][0]["mean"]["value"] == 0.5 and found["arms"][1]["mean"]["value"] == 0.75


def test_tasks_with_another_metric(arm: Callable[..., str]) -> None:
    first, second = arm("table", 0, {"a": 0.5, "b": 0.5}), arm("mlp", 0, {"a": 0.75, "b": 0.5})
    path = Path(second) / "eval_results.json"
    results = json.loads(path.read_text())
    results["experts"]["tasks"]["a"] |= {"metric": "rouge_l", "rouge_l": 0.9}
    path.write_text(json.dumps(results))
    found = compare_runs([first, second])
    assert [task["name"] for task in found["tasks"]] == ["b"]
    assert found["remarks"][0] == "a: left out, its metric is exact_match here and rouge_l there"


def test_scores_of_other_rows_are_said(arm: Callable[..., str]) -> None:
    more = "eval_split: test\ndata: {max_length: 3}\n"
    found = compare_runs([arm("table", 0, {"a": 0.5}), arm("table", 1, {"a": 0.5}, more=more)])
    assert [r for r in found["remarks"] if "of other rows" in r] == [
        "data.max_length differs between the arms: their scores may be of other rows",
        "eval_split differs between the arms: their scores may be of other rows",
    ]


# -- errors -------------------------------------------------------------------------------------------------


def test_runs_that_cannot_be_compared(arm: Callable[..., str], tmp_path: Path) -> None:
    done, open_end = arm("table", 0, {"a": 0.5}), arm("mlp", 0, None)
    apart, broken = arm("apart", 0, {"z": 0.5}), arm("broken", 0, {"a": 0.5})
    (Path(broken) / "eval_results.json").write_text('{"experts": {"tasks": {"a": {"rows": 3}}}}')
    for other, message in {
        f"{done}/../table-s0": "the same run as",
        open_end: r"mlp-s0: no eval_results\.json: the run has not finished",
        f"{done}x": "table-s0x: no such folder; the nearest is .*table-s0$",
        f"{done}/checkpoint-20": "not a run folder .*; only whole runs are compared",
        apart: "no task is in all of table-s0, apart-s0: nothing to compare",
        broken: "eval_results.json: not the results of an evaluation",
    }.items():
        with pytest.raises(FactsError, match=message) as error:
            compare_runs([done, other])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["compare"], "compare: RUN1 RUN2 is missing"),
        (["compare", "one"], "compare: RUN1 RUN2 are needed, not 'one' alone"),
        (["compare", "one", "two", "--jsn"], "compare: unexpected argument '--jsn'"),
        (["compare", "one", "two"], "one: no such folder"),
        (["compare", "one", "two", "--markdown", "far/away.md"], "--markdown: far/away.md lies in a folder"),
    ],
    ids=" ".join,
)
def test_user_errors(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


# -- what is printed and written ----------------------------------------------------------------------------


def test_json_is_one_object(two_arms: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *two_arms, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out) == json.loads(json.dumps(compare_runs(two_arms)))


def test_text_markdown_and_html(
    two_arms: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    files = ["--markdown", str(tmp_path / "c.md"), "--html", str(tmp_path / "c.html")]
    assert cli.main(["compare", *two_arms, *files]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mlp .* moe\.router: mlp .* 3 .* -8\.3 % \[.*\] .* -8\.3 % .* 1/0/1 ", text)
    assert re.search(r"a .* 0\.6000 .* 0\.7000 .*\+0\.1000 \[-0\.1484, \+0\.3484\] .*\+16\.7 %", text)
    markdown = (tmp_path / "c.md").read_text()
    row = "| a | exact_match | 0.6000 | 0.7000 | +0.1000 [-0.1484, +0.3484] | +16.7 % |"
    assert row in markdown.splitlines() and markdown.startswith("# mlp against table\n")
    html = (tmp_path / "c.html").read_text()
    assert "<td>+0.1000 [-0.1484, +0.3484]</td>" in html
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", html)  # nothing is fetched
    assert "Plotly.newPlot" in html


def test_the_plot_shows_differences_and_intervals(two_arms: list[str]) -> None:
    (dots,) = plot(compare_runs(two_arms)).data
    assert list(dots.y) == ["b", "a"] and list(dots.x) == pytest.approx([-0.1, 0.1])
    assert list(dots.error_x.array)[1] == pytest.approx(0.24841, abs=1e-5)
    assert list(dots.error_x.arrayminus)[1] == pytest.approx(0.24841, abs=1e-5)


class Tags(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def test_names_are_text(arm: Callable[..., str]) -> None:
    evil = "</script><img src=x onerror=alert(1)>|`[red]"
    found = compare_runs([arm("table", 0, {evil: 0.5}), arm("mlp", 0, {evil: 0.75})])
    tags = Tags()
    tags.feed(as_html(found))
    assert "img" not in tags.found and "script" in tags.found
    line = next(line for line in as_markdown(found).splitlines() if "onerror" in line)
    assert "<img" not in line and r"\|\`[red]" in line


def test_many_tasks_on_the_terminal(
    arm: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    names = [f"task{i:02}" for i in range(50)]
    runs = [
        arm("table", 0, dict.fromkeys(names, 0.5)),
        arm("mlp", 0, {n: i / 50 for i, n in enumerate(names)}),
    ]
    assert cli.main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert "40 of 50 tasks" in text and "task00" in text and "task49" in text and "task25" not in text


def test_seeds_of_one_arm_alone(two_arms: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *two_arms[:3]]) == 0
    assert "0.4500 ± 0.0866" in capsys.readouterr().out
    assert "newPlot" not in as_html(compare_runs(two_arms[:3]))


def test_every_field_is_documented(two_arms: list[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "TRACKING.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"[`.]([a-z_]+)(?:\[\])?`", text.partition("\n## compare\n")[2]))
    found = compare_runs(two_arms)
    arm, task = found["arms"][1], found["tasks"][0]
    parts = (arm["mean"], arm["wins"], arm["difference"], arm["relative_gain"])
    objects = (found, arm, *parts, task, task["arms"][1])
    names = {name for of in objects for name in of}
    assert names <= documented, names - documented
