"""The README's examples are tests: every block behind `<!-- example: name -->` runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = dict(re.findall(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```", README.read_text(), flags=re.DOTALL))


def test_there_are_examples():
    assert {"open_clip", "search"} <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[name], f"README.md [{name}]", "exec"), {})


def test_no_placeholder_is_left():
    assert not re.findall(r"<!-- [A-Z]+ -->", README.read_text())


def test_files_that_the_readme_names_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert links and all((README.parent / link).exists() for link in links)
