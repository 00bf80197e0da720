"""What a user installs: metadata, extras, pins, the wheel's content, and the commands of a fresh checkout."""

import ast
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("patchrank", "predictors", "export", "eval")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULE_NAMES = {
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "onnxruntime-gpu": "onnxruntime",
}
PATHS = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def requirements(*groups: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(text) for group in groups for text in group]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def modules(distributions: dict[str, Requirement]) -> set[str]:
    """Import names of distributions; a dash becomes an underscore unless MODULE_NAMES says otherwise."""
    return {MODULE_NAMES.get(name, name.replace("-", "_")) for name in distributions}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def third_party(nodes: list[ast.stmt]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def test_metadata() -> None:
    import patchrank

    assert PROJECT["name"] == "patchrank"
    assert PROJECT["version"] == patchrank.__version__
    assert PROJECT["requires-python"] == ">=3.11"
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert (ROOT / PROJECT["readme"]).is_file()


def test_extras() -> None:
    assert set(EXTRAS) == {"cpu", "gpu", "openvino", "trt", "rtx", "serve", "pretrain", "bench", "test"}
    base = requirements(PROJECT["dependencies"])
    assert not {name for name in base if name.startswith(("onnx", "tensorrt", "tritonclient"))}
    assert "onnxruntime" in requirements(EXTRAS["cpu"])
    assert "onnxruntime" not in requirements(EXTRAS["gpu"]), "onnxruntime overwrites the files of onnxruntime-gpu"


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    direct, pinned = requirements(PROJECT["dependencies"], *EXTRAS.values()), pins()
    assert set(direct) == set(pinned)
    outside = [f"{name}=={pinned[name]}" for name in direct if not direct[name].specifier.contains(pinned[name])]
    assert not outside


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_declared(path: Path) -> None:
    """Module level: dependencies of the base install (and of cpu in export/); inside functions: any extra."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = requirements(PROJECT["dependencies"], EXTRAS["cpu"] if path.is_relative_to(ROOT / "export") else [])
    later = requirements(PROJECT["dependencies"], *EXTRAS.values())
    assert third_party(tree.body) <= modules(at_once), "import it inside the function, or declare it in pyproject.toml"
    assert third_party(list(ast.walk(tree))) <= modules(later), "declare it in pyproject.toml"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_imports_and_does_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`__main__` included: the command line is read only when the module is run."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
    assert capsys.readouterr().out == ""


def test_every_folder_of_modules_is_a_package() -> None:
    without = {str(path.parent.relative_to(ROOT)) for path in PATHS if not (path.parent / "__init__.py").is_file()}
    assert not without, "a folder without __init__.py is left out of the wheel"


def test_wheel_holds_the_four_packages_and_the_assets(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    build = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert held == expected


def test_targets_of_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE))
    assert {"demo", "test", "test-system", "lint", "bench", "help", "clean"} <= targets
    assert set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split()) == targets


@pytest.mark.skipif(not shutil.which("make"), reason="make is absent")
def test_make_names_the_python_it_needs(tmp_path: Path) -> None:
    python = tmp_path / "old-python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    arguments = ["make", "--no-print-directory", "test", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: PYTHON={python}: ")
    assert "3.11" in result.stderr.splitlines()[0]


def clean_environment() -> dict[str, str]:
    """This environment without what a `make` around the tests would pass on to one inside."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def test_continuous_integration_can_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    for target in ("lint", "test", "test-system"):
        assert target in script.read_text()


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml", "constraints.txt", ".ci/run"])
def test_pip_settings_of_the_machine_decide(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"index-url|find-links|https?://", text.replace("PIP_", "")), "pip's environment decides"


def test_a_torch_that_is_there_stays() -> None:
    constraints = runpy.run_path(str(ROOT / ".ci" / "keep_torch.py"))["constraints"]
    pinned = ["torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6"]
    assert constraints(pinned, "torch>=2.9", None, None) == pinned
    assert constraints(pinned, "torch>=2.9", "2.8.1+cu128", "0.23.1") == pinned
    assert constraints(pinned, "torch>=2.9", "2.11.0+cu130", None) == ["numpy==2.4.6", "torch==2.11.0+cu130"]
    kept = constraints(pinned, "torch>=2.9", "2.11.0", "0.26.0")
    assert kept == ["numpy==2.4.6", "torch==2.11.0", "torchvision==0.26.0"]
