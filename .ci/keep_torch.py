"""Print constraints.txt for the environment whose Python runs this: a torch that is already there stays.

The pins name one torch. Where the environment has another that patchrank can use, fetching the pinned one would
cost gigabytes and may not fit the machine's driver: its version replaces the pin, and torchvision follows it.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def release(text: str) -> tuple[int, ...]:
    """(2, 13) from "2.13.0+cpu" or "torch>=2.13"."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def installed(name: str) -> str | None:
    """The version of `name` in this environment, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def constraints(pins: list[str], oldest_torch: str, torch: str | None, torchvision: str | None) -> list[str]:
    """`pins` with the torch and torchvision lines of the environment, if its torch is not older than `oldest_torch`.

    A torchvision that is absent is left to pip, which takes the one that belongs to that torch.
    """
    if torch is None or release(torch) < release(oldest_torch):
        return pins
    others = [pin for pin in pins if pin.partition("==")[0] not in ("torch", "torchvision")]
    there = {"torch": torch, "torchvision": torchvision}
    return others + [f"{name}=={number}" for name, number in there.items() if number]


def main() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest_torch = next(line for line in dependencies if line.startswith("torch>="))
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    print("\n".join(constraints(pins, oldest_torch, installed("torch"), installed("torchvision"))))


if __name__ == "__main__":
    main()
