"""Where a number comes from: the command, the versions and the machine, for every result file."""

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import patchrank

_PACKAGES = ("torch", "open_clip_torch", "timm", "numpy", "onnxruntime")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that compute."""
    found = {"patchrank": patchrank.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command(program: str) -> str:
    """The command line as a user would type it; folders of this machine are reduced to their last part."""
    words = [_short(word) for word in sys.argv[1:]]
    return shlex.join(["python", "-m", *program.split(), *words])


def _short(word: str) -> str:
    """A path, or the path of name=path, without the folders of this machine."""
    name, sign, value = word.rpartition("=")
    return f"{name}{sign}{Path(value).name}" if Path(value).is_absolute() else word


def machine() -> dict[str, str | int]:
    """Processor, threads and device names; no host name."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": processor, "threads": torch.get_num_threads(), "gpu": gpu}
