"""What an installed taskmoe consists of. An editable install would not show an omission; a wheel would."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOP = ("kernels", "moe", "train")


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {p.parent.relative_to(ROOT) for top in TOP for p in (ROOT / top).rglob("*.py")}
    names = {".".join(("taskmoe", *folder.parts)) for folder in folders}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def test_sub_folders_are_regular_packages() -> None:
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        if package != "taskmoe.kernels":
            assert (ROOT.joinpath(*package.split(".")[1:]) / "__init__.py").exists(), package


def test_the_console_script_exists() -> None:
    module, function = PROJECT["project"]["scripts"]["taskmoe"].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert re.search(rf"^def {function}\(", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {normal(r.name): r for r in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_exactly_and_torch_first() -> None:
    locked = pins()
    for requirement in locked.values():
        assert re.fullmatch(r"==[^*+]+", str(requirement.specifier)), f"{requirement} is no exact version"
        assert requirement.url is None
    assert next(iter(locked)) == "torch"


def test_the_lock_satisfies_the_project() -> None:
    locked = pins()
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for text in wanted:
        requirement = Requirement(text)
        pin = locked.get(normal(requirement.name))
        assert pin is not None, f"{text} is not in requirements.lock; run make lock"
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), (
            f"requirements.lock has {pin}, pyproject.toml wants {text}"
        )


def test_the_lock_is_closed() -> None:
    """Nothing that a locked package needs is missing, so that nothing unlocked is ever installed."""
    locked = pins()
    for name in locked:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # not for this platform
        for text in needs:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if re.match(r"(nvidia|cuda)-", normal(requirement.name)):
                continue  # a CUDA build of torch names the CUDA packages that belong to it
            assert normal(requirement.name) in locked, f"{name} needs {text}"


def test_a_wheel_holds_every_file(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for top in TOP:
        shutil.copytree(ROOT / top, copy / top, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*command, str(tmp_path), str(copy)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (p for top in TOP for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert inside == {f"taskmoe/{p.relative_to(ROOT)}" for p in files}
