"""Who may import whom: kernels <- moe <- train, no cycles, and the corners that only one file may enter."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "moe", "train")  # each may import itself and those before it


def sources() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path: Path, *, at_import_time: bool = False) -> list[str]:
    """Dotted names that a file imports; ``from a import b`` gives ``a`` and ``a.b``.

    With ``at_import_time``, only those that run when the file is imported: neither in a function nor for the
    type checker alone.
    """
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append(node.module or "")
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        if at_import_time:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                return
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("taskmoe", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def upward(layer: str, names: list[str]) -> list[str]:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    return [name for name in names if any(f"{name}.".startswith(f"taskmoe.{other}.") for other in above)]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_upward(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    assert not upward(layer, imports(path)), f"{path} imports a layer above its own"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_bare_names(path: Path) -> None:
    bare = [name for name in imports(path) if name.split(".")[0] in LAYERS]
    assert not bare, f"{path} imports {bare}; write taskmoe.{bare[0]}"


def test_the_check_itself_finds_an_upward_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from taskmoe import train\n    import taskmoe.moe.tasks\n")
    assert upward("kernels", imports(bad)) == ["taskmoe.train", "taskmoe.moe.tasks"]
    assert upward("moe", imports(bad)) == ["taskmoe.train"]
    assert imports(bad, at_import_time=True) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        done.add(node)
        return next(filter(None, (walk(other, [*path, node]) for other in sorted(graph[node]))), None)

    return next(filter(None, (walk(node, []) for node in sorted(graph))), None)


def test_no_cycles() -> None:
    modules = {module_of(path): path for path in sources()}
    graph = {
        module: {name for name in imports(path, at_import_time=True) if name in modules and name != module}
        for module, path in modules.items()
    }
    assert find_cycle(graph) is None
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def importers(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == package for name in imports(path))
    }


def test_only_one_file_imports_wandb() -> None:
    assert importers("wandb") == {"train/track/wandb_log.py"}


def test_wandb_is_imported_lazily() -> None:
    names = imports(ROOT / "train" / "track" / "wandb_log.py", at_import_time=True)
    assert not any(name.split(".")[0] == "wandb" for name in names)


def test_only_the_command_line_parses_arguments() -> None:
    assert importers("argparse") <= {"train/cli.py"}


def test_kernels_need_torch_and_triton_alone() -> None:
    foreign = {"transformers", "deepspeed", "peft", "datasets", "wandb", "yaml"}
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not foreign & {name.split(".")[0] for name in imports(path)}, path
