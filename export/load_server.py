"""`export.serve` as a process of its own, for as long as somebody measures it; and what a server says of itself."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchrank.errors import UserError

_START_S = 120.0


@contextmanager
def own_server(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """Serve a folder on a free loopback port; gives host:port, and stops the server afterwards.

    Args: log, the file that gets what the server prints. Raises: UserError with the log's last line.
    """
    command = [sys.executable, "-m", "export.serve", "--model", str(model), "--port", "0", *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield _wait(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait(process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"on http://(\S+)/", log.read_text())
        if found and is_ready(found[1]):
            return found[1]
        time.sleep(0.1)
    process.kill()
    raise UserError(f"the server does not start: {(log.read_text().strip() or 'it says nothing').splitlines()[-1]}")


def is_ready(url: str) -> bool:
    """Whether a KServe server at host:port takes requests."""
    try:
        with urllib.request.urlopen(f"http://{url}/v2/health/ready", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _get(url: str, path: str) -> dict[str, Any]:
    """A JSON answer; empty where the server has none."""
    try:
        with urllib.request.urlopen(f"http://{url}{path}", timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return {}


def about(url: str, model: str) -> dict[str, Any]:
    """Name and version of the server at host:port, and the threads of one call of `model` where it tells (Triton)."""
    server, config = _get(url, "/v2"), _get(url, f"/v2/models/{model}/config")
    threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value")
    return {
        "name": server.get("name"),
        "version": server.get("version"),
        "threads": None if threads is None else int(threads),
    }
