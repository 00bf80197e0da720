"""What README.md and docs/*.md name is there: commands parse, flags, files and table rows exist."""

import importlib
import re
import shlex
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
import tyro

from eval.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("patchrank", "predictors", "export", "eval")
FOREIGN = {"nproc-per-node": "torchrun", "data-binary": "curl", "ports": "tests/triton_server.py"}
"""Flags of other programs."""


def code(page: Path) -> list[str]:
    """Lines of code blocks, continued ones joined and without their comments, and code in the text."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    return [re.sub(r"(?<!\S)#.*", "", line) for line in lines] + re.findall(r"`([^`\n]+)`", rest)


def commands(page: Path) -> list[tuple[str, str]]:
    """(module, its words) of every `python -m` and `torchrun -m` of ours."""
    found = []
    for line in code(page):
        for part in re.split(r"&&|\|(?!\|)|;", line):
            match = re.search(r"(?:python|torchrun\b.*?) -m ([\w.]+)(.*)", part)
            if match and match[1].split(".")[0] in PACKAGES:
                found.append((match[1], match[2].strip()))
    return found


@cache
def config_of(module: str) -> type:
    """The dataclass of a command's flags, as its file passes it to `cli.run`."""
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    name = re.search(rf'cli\.run\(\w+, (\w+), prog="python -m {re.escape(module)}"', path.read_text())[1]
    return getattr(importlib.import_module(module + (".__main__" if path.stem == "__main__" else "")), name)


def parse(module: str, words: list[str]) -> None:
    """As the command would; leaves with code 2 for an unknown command, flag or kind of value."""
    if module == "eval" and not words:
        return  # lists the commands
    if module == "eval":
        assert words[0] in COMMANDS, words[0]
        config, words = COMMANDS[words[0]][0], words[1:]
    else:
        config = config_of(module)
    tyro.cli(config, prog=module, args=words, config=(tyro.conf.OmitArgPrefixes,))


def flags_of(config: type) -> set[str]:
    """Names of a command's flags, those of nested options included."""
    names, hints = set(), get_type_hints(config)
    for field in fields(config):
        names |= flags_of(hints[field.name]) if is_dataclass(hints[field.name]) else {field.name.replace("_", "-")}
    return names | {f"no-{name}" for name in names}


def known_flags() -> set[str]:
    """Flags of all commands that some page names, and of all of `python -m eval`."""
    modules = {module for page in PAGES for module, _ in commands(page) if module != "eval"}
    configs = [config_of(module) for module in modules] + [config for config, _ in COMMANDS.values()]
    return set().union(*map(flags_of, configs))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, capsys):
    for module, words in commands(page):
        try:
            parse(module, [word for word in shlex.split(words) if word != "..."])
        except SystemExit:
            pytest.fail(f"{page.name}: python -m {module} {words}\n{capsys.readouterr()}")


def test_the_pages_name_commands_of_every_package_and_a_wrong_one_is_seen():
    named = {module.split(".")[0] for page in PAGES for module, _ in commands(page)}
    assert named == set(PACKAGES)
    for module, words in (("export.serve", ["--prot", "1"]), ("eval", ["zero-shot", "--limit", "few"])):
        with pytest.raises(SystemExit):
            parse(module, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    named = {flag for line in code(page) for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", line)}
    assert not named - known_flags() - FOREIGN.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    """Those in links, and those in code that begin with a folder of the repository."""
    links = [page.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text())]
    folders = "|".join((*PACKAGES, "tests", "docs"))
    named = {path for line in code(page) for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./*-]*", line)}
    named -= {path for path in named if re.search(r"\.[A-Z_]+$", path)}  # tables, which have a test of their own
    absent = [link for link in links if not link.exists()]
    absent += [path for path in named if not list(ROOT.glob(path.rstrip("/.")))]
    assert not absent


def test_tables_of_the_design_exist():
    """`path/module.TABLE` in docs/design.md, from the root or from patchrank/."""
    text = (ROOT / "docs/design.md").read_text()
    named = re.findall(r"`((?:\w+/)*\w+)\.([A-Z_]+)`", text)
    assert len(named) > 5
    for path, table in named:
        path = path if path.split("/")[0] in PACKAGES else f"patchrank/{path}"
        assert hasattr(importlib.import_module(path.replace("/", ".")), table), f"{path}.{table}"


def test_the_design_names_every_folder_of_code():
    text = (ROOT / "docs/design.md").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    absent = [folder for folder in folders if f"{folder}/" not in text]
    assert not absent
