"""The shape of the tree: imports point down only, names shadow nothing, the top level holds nothing else."""

import ast
import builtins
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "patchrank": {"patchrank"},
    "predictors": {"predictors", "patchrank"},
    "export": {"export", "predictors", "patchrank"},
    "eval": {"eval", "export", "predictors", "patchrank"},
}
TOP_LEVEL = {"LICENSE", "Makefile", "README.md", "constraints.txt", "docs", "pyproject.toml", "tests", *MAY_IMPORT}
TOP_LEVEL |= {".ci", ".git", ".gitignore"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything that `tree` imports absolutely, at any depth, `import_module("...")` included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in names}


def imports_of(path: Path) -> set[str]:
    return imported(ast.parse(path.read_text(encoding="utf-8"), str(path)))


@pytest.mark.parametrize(
    "source",
    [
        "import predictors.train",
        "from predictors import x",
        "def f():\n    import predictors as p",
        "import importlib\nimportlib.import_module('predictors.train')",
    ],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert "predictors" in imported(ast.parse(source))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down_only(package: str) -> None:
    assert sources(package), f"{package}/ holds no Python file"
    upward = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports_of(path) & (set(MAY_IMPORT) - MAY_IMPORT[package])
    }
    assert not upward


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_relative_import_leaves_its_package(package: str) -> None:
    for path in sources(package):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ImportFrom) or node.level <= depth, f"{path}: line {node.lineno}"


def test_no_file_is_named_like_a_builtin_or_a_library() -> None:
    libraries = set().union(*(imports_of(path) for package in [*MAY_IMPORT, "tests"] for path in sources(package)))
    taken = (libraries | set(sys.stdlib_module_names) | set(dir(builtins))) - set(MAY_IMPORT) - {"conftest"}
    taken |= {"clip", "datasets", "onnx", "tensorrt", "timm", "torch", "triton"}
    names = {path for package in MAY_IMPORT for path in (ROOT / package).rglob("*") if path.suffix in ("", ".py")}
    shadows = {str(path.relative_to(ROOT)) for path in names if path.stem in taken}
    assert not shadows, "a file or folder of this name hides the module that it is named like; rename it"


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "misc"}
    found = [str(path) for package in MAY_IMPORT for path in sources(package) if path.stem in drawers]
    assert not found, "name the file after its one responsibility"


def test_top_level_holds_nothing_else() -> None:
    ignored = [".git"]
    for file in (ROOT / ".gitignore", ROOT / ".git" / "info" / "exclude"):
        ignored += file.read_text().splitlines() if file.is_file() else []
    patterns = [line.strip().strip("/") for line in ignored if line.strip() and not line.startswith("#")]
    strays = {
        path.name
        for path in ROOT.iterdir()
        if path.name not in TOP_LEVEL and not any(fnmatch(path.name, pattern) for pattern in patterns)
    }
    assert not strays, "put these into a package or docs/, or list your own in .git/info/exclude"
