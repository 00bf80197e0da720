"""torchvision beside a torch that its compiled part was not built for."""

import importlib
import subprocess
import sys

import pytest

from patchrank import torchvision_shim


def test_open_clip_imports_in_a_fresh_process() -> None:
    code = (
        "from patchrank.torchvision_shim import ensure_torchvision as ensure; ensure(); ensure();"
        "import open_clip, torchvision.datasets, torchvision.transforms as t; print(t.Resize(4).size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"


@pytest.mark.parametrize("error", [ImportError("no torchvision"), RuntimeError("something else")])
def test_other_failures_are_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(type(error), match=str(error)):
        torchvision_shim.ensure_torchvision()
