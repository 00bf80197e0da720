"""Processes of the study: some at a time, one thread each, none of which outlives the study."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

_PR_SET_PDEATHSIG = 1


def run_all(commands: dict[str, list[str]], logs: Path, num_jobs: int, bar: tqdm, after: Callable[[], None]) -> None:
    """Keep `num_jobs` commands going until none is left; each writes what it says to <logs>/<name>.txt.

    Args: commands by name; after: called whenever one has ended. Whether one succeeded is for the caller to see.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen] = {}
    waiting = list(commands)
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                name = waiting.pop(0)
                running[name] = _start(commands[name], logs / f"{name}.txt")
                bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
            for name in [one for one, process in running.items() if process.poll() is not None]:
                running.pop(name)
                bar.update()
                after()
    finally:
        for process in running.values():
            process.terminate()


def _start(words: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, preexec_fn=_end_with_the_study
        )


def _end_with_the_study() -> None:
    """Let the kernel end this run when the study is killed; elsewhere than on Linux its lock guards its folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
