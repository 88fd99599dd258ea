"""The command line: what is handed on, and that every user error is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from taskmoe.moe.config import ConfigError
from taskmoe.moe.tasks import TaskError
from taskmoe.train import cli
from taskmoe.train.config import Config
from taskmoe.train.config_io import load
from taskmoe.train.usage import USAGE

BASE = "model: {type: llama, hidden_size: 32}\ndata: {skill_gym: {}}\nmax_steps: 10\n"


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cfg(tmp_path: Path) -> str:
    (tmp_path / "cfg.yaml").write_text(BASE)
    return "cfg.yaml"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stand-ins for training, the launcher and evaluation; what they were called with."""
    calls: list[tuple] = []

    def stand_in(module: str, function: str, code: int) -> None:
        fake = ModuleType(f"taskmoe.train.{module}")

        def record(*args: Any) -> int:
            calls.append((function, *args))
            return code

        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)

    stand_in("loop", "train", 0)
    stand_in("launch", "launch_ranks", 7)
    stand_in("run_eval", "evaluate_run", 0)
    return calls


@pytest.fixture
def error(capfd: pytest.CaptureFixture[str]):
    """The message of a command that must end as user errors do."""

    def run(*argv: str) -> str:
        before = sorted(Path.cwd().rglob("*"))
        assert cli.main(argv) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith("taskmoe: error: ")
        assert sorted(Path.cwd().rglob("*")) == before  # nothing half-written
        return err.removeprefix("taskmoe: error: ").rstrip("\n")

    return run


# -- what is handed on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "cfg.yaml", "--seed", "3", "--bf16"],
        ["train", "--bf16", "cfg.yaml", "--seed=3"],
        ["--local_rank=0", "train", "cfg.yaml", "--bf16", "--seed", "3"],
        ["train", "--local_rank", "0", "cfg.yaml", "--bf16", "--seed", "3"],
        ["train", "cfg.yaml", "--bf16", "--seed", "3", "--local-rank=0"],
        ["train", "cfg.yaml", "--bf16", "--seed", "3", "--num_ranks", "1"],
    ],
    ids=" ".join,
)
def test_train_gets_the_config(cfg: str, called: list[tuple], argv: list[str]) -> None:
    assert cli.main(argv) == 0
    assert called == [("train", load(cfg, ["--seed", "3", "--bf16"]))]
    assert isinstance(called[0][1], Config)


@pytest.mark.parametrize("option", [["--num_ranks", "2"], ["--num_ranks=2"]], ids=" ".join)
def test_num_ranks_goes_to_the_launcher_with_the_same_settings(
    cfg: str, called: list[tuple], option: list[str]
) -> None:
    assert cli.main(["train", *option, cfg, "--bf16", "--run_name", "a b=c"]) == 7
    ((_, num_ranks, argv),) = called
    assert num_ranks == 2
    assert argv == ["train", cfg, "--bf16=true", "--run_name=a b=c"]
    called.clear()
    assert cli.main(["--local_rank=1", *argv]) == 0  # as the launcher calls each rank
    assert called == [("train", load(cfg, ["--bf16", "--run_name=a b=c"]))]


def test_eval_gets_run_overrides_split_and_json(called: list[tuple], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "base").mkdir()
    assert cli.main(["eval", "run"]) == 0
    assert cli.main(["eval", "--json", "run", "--split", "test", "--data.root", "other"]) == 0
    assert cli.main(["eval", "run", "--data", "other", "--split=train", "--num_beams", "4"]) == 0
    assert cli.main(["eval", "--baseline", "base", "run"]) == 0
    assert called == [
        ("evaluate_run", "run", [], None, False, None, "error"),
        ("evaluate_run", "run", ["--data.root=other"], "test", True, None, "error"),
        ("evaluate_run", "run", ["--num_beams=4", "--data.root=other"], "train", False, None, "error"),
        ("evaluate_run", "run", [], None, False, "base", "error"),
    ]


def test_config_prints_settings_that_load_again(
    cfg: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["config", cfg, "--max_length", "9"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    assert load("again.yaml") == load(cfg, ["--max_length", "9"])


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--schema"]) == 0
    assert "max_steps" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert "example" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_commands_has_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([name, "anything", "--help"]) == 0
    out = capsys.readouterr().out
    assert out == USAGE[name] and "example" in out and f"\n  taskmoe {name} " in out
    assert max(map(len, out.splitlines())) <= 110


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"taskmoe {version('taskmoe')}\n"


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], f"no command; give one of {', '.join(cli.COMMANDS)}, or"),
        (
            ["trian", "cfg.yaml"],
            f"unknown command 'trian'; the nearest of {', '.join(cli.COMMANDS)} is 'train'",
        ),
        (["train"], "train: CFG.yaml is missing"),
        (["train", "--bf16"], "train: CFG.yaml is missing"),
        (["train", "cfg.yaml", "other.yaml"], "train: unexpected argument 'other.yaml'"),
        (["train", "cgf.yaml"], "cgf.yaml: no such config file; the nearest is cfg.yaml"),
        (
            ["train", "cfg.yaml", "--max_lenght", "3"],
            "--max_lenght: unknown key; the nearest is data.max_length",
        ),
        (["train", "cfg.yaml", "--seed"], "--seed: a value is missing"),
        (["train", "cfg.yaml", "--seed", "x"], "--seed: expected a whole number, found 'x'"),
        (["train", "cfg.yaml", "--cap", "3"], "--cap: mixing.cap: has no effect"),
        (["train", "cfg.yaml", "--num_ranks", "two"], "--num_ranks: 'two' is not a number of processes"),
        (["train", "cfg.yaml", "--num_ranks"], "--num_ranks: a value is missing"),
        (["train", "cfg.yaml", "--num_ranks", "0"], "--num_ranks: '0' is not a number of processes"),
        (["train", "cfg.yaml", "--deepspeed", "x.json"], "deepspeed: cannot read x.json"),
        (["train", "cfg.yaml", "--gate", "softmx"], "--gate: moe.gate: 'softmx' is not one of"),
        (["config"], "config: CFG.yaml is missing"),
        (["config", "--schema", "cfg.yaml"], "--schema takes nothing beside it"),
        (["eval"], "eval: RUN is missing"),
        (["eval", "runn"], "runn: no such run folder; the nearest is run"),
        (["eval", "run", "--split", "tset"], "--split: 'tset' is not one of train, validation, test"),
        (["eval", "run", "--baseline", "runs"], "runs: no such run folder; the nearest is run"),
        (["eval", "run", "--jsn"], "--jsn: unknown key"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_user_errors(
    cfg: str, called: list[tuple], error, tmp_path: Path, argv: list[str], message: str
) -> None:
    (tmp_path / "run").mkdir()
    assert error(*argv).startswith(message)
    assert called == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [1", "cfg.yaml:1: not YAML"),
        ("- a\n", "cfg.yaml:1: expected a mapping"),
        (BASE + "max_steps: 5\n", "cfg.yaml:4: max_steps: the key stands here twice; first at cfg.yaml:3"),
        (BASE + "max_step: 5\n", "cfg.yaml:4: max_step: unknown key; the nearest is max_steps"),
        (BASE + "bf16: yes\n", "cfg.yaml:4: bf16: expected true or false"),
        (BASE + "mixing: {strategy: equal, cap: 4}\n", "cfg.yaml:4: mixing.cap: has no effect"),
        (BASE + "phases: [{steps: 4}]\n", "phases: their steps add up to 4, but max_steps is 10"),
        ("", "model_name_or_path: neither is set"),
    ],
)
def test_bad_files(called: list[tuple], error, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cfg.yaml").write_text(text)
    found = error("train", "cfg.yaml")
    assert message in found and "Traceback" not in found
    assert called == []


class _OwnFailure(RuntimeError):
    """As taskmoe's own errors that are not about what the user wrote."""

    __module__ = "taskmoe.train.engine"


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (ConfigError("a: is\n  wrong"), 2, "taskmoe: error: a: is wrong\n"),
        (TaskError("no task"), 2, "taskmoe: error: no task\n"),
        (_OwnFailure("the loss is not a number"), 1, "taskmoe: error: the loss is not a number\n"),
        (KeyboardInterrupt(), 130, "taskmoe: interrupted\n"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_of_a_command(
    cfg: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    line: str,
    rank: str,
) -> None:
    def fail(tokens: list[str]) -> int:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert cli.main([f"--local_rank={rank}", "train", cfg]) == code
    assert capfd.readouterr() == ("", line if rank == "0" else "")
    monkeypatch.setenv("RANK", "3")  # the rank over all machines decides, not the local one
    assert cli.main([f"--local_rank={rank}", "train", cfg]) == code
    assert capfd.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback(cfg: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tokens: list[str]) -> int:
        raise ValueError("not ours")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(ValueError, match="not ours"):
        cli.main(["train", cfg])


def test_num_ranks_under_a_launcher(cfg: str, error, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "a launcher has started this process already" in error("train", cfg, "--num_ranks", "2")


# -- as a program ---------------------------------------------------------------------------------------


def test_help_and_mistyped_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; from taskmoe.train import cli; cli.main(['--help']); cli.main(['trian'])\n"
        "cli.main(['train', '--help']); cli.main(['eval'])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_as_a_program(cfg: str) -> None:
    command = [sys.executable, "-m", "taskmoe.train.cli", "--local_rank=0", "config", cfg, "--sed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "taskmoe: error: --sed: unknown key; the nearest is seed\n"
