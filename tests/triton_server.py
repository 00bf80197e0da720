"""Test scaffolding: the real tritonserver binary on this machine's CPU, on a model repository of `export.triton_repo`.

The binary comes with the nvidia-pytriton wheel, which has Triton's Python back end but none for ONNX Runtime; a small
Python-based one under that name (`triton_backend/model.py`) takes its place, so that the repository is served as it is.
The packages are installed by pip into a folder of their own, `.venv-triton`, once.

    python tests/triton_server.py out/triton/models -- python -m export.load --url 127.0.0.1:8000

starts the server, runs the command behind `--`, stops the server. Without a command it serves until Ctrl-C.
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

PYTRITON = "nvidia-pytriton==0.7.0"
PACKAGES = Path(__file__).parent.parent / ".venv-triton"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Missing(Exception):
    """Triton cannot run here; the message says what is absent."""


def packages() -> Path:
    """The folder with Triton's packages, installed now if it is absent. Raises: Missing."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        raise Missing("the wheel with the tritonserver binary is for Linux on x86-64")
    try:
        ctypes.CDLL(f"libpython{_PYTHON}.so.1.0")
    except OSError as error:
        raise Missing(f"libpython{_PYTHON} is absent (Debian: apt-get install libpython{_PYTHON})") from error
    if not PACKAGES.is_dir():
        _install()
    stub = PACKAGES / f"pytriton/tritonserver/python_backend_stubs/{_PYTHON}/triton_python_backend_stub"
    if not stub.is_file():
        raise Missing(f"{PYTRITON} has no stub for Python {_PYTHON}")
    return PACKAGES


def _install() -> None:
    """pip into a temporary folder, which gets its name when all is there."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PACKAGES.name}-", dir=PACKAGES.parent))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    try:
        # Without its dependencies: the binary needs none of them, and they would not fit beside each other.
        for wanted in (["--no-deps", PYTRITON], ["numpy<2", f"onnxruntime=={version('onnxruntime')}"]):
            try:
                result = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=600)
            except subprocess.TimeoutExpired as error:
                raise Missing(f"pip does not get {wanted[-1]} within 10 minutes") from error
            if result.returncode:
                raise Missing(f"pip cannot install {wanted[-1]}: {(result.stderr.strip() or '?').splitlines()[-1]}")
        folder.chmod(0o755)
        folder.rename(PACKAGES)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class TritonServer:
    """A server process on loopback with its own ports; as a context manager it is started, awaited and stopped."""

    def __init__(self, repository: Path, ports: tuple[int, int, int] | None = None) -> None:
        self.repository = Path(repository).resolve()
        self.http, self.grpc, self.metrics = ports or (free_port(), free_port(), free_port())
        self.folder = Path(tempfile.mkdtemp(prefix="triton-"))
        self.log = self.folder / "log.txt"
        self.process: subprocess.Popen | None = None
        self._backends(packages())

    def _backends(self, found: Path) -> None:
        server = found / "pytriton" / "tritonserver"
        backends = self.folder / "backends"
        shutil.copytree(server / "backends" / "python", backends / "python")
        shutil.copy(server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub", backends / "python")
        shutil.copytree(Path(__file__).parent / "triton_backend", backends / "onnxruntime")
        (self.folder / "empty").mkdir()

    def start(self, timeout: float = 90.0) -> None:
        """Start and wait until every model is ready. Raises: RuntimeError with the log's end."""
        found = packages()
        binary = found / "pytriton" / "tritonserver" / "bin" / "tritonserver"
        libraries = found / "nvidia_pytriton.libs"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"LD_LIBRARY_PATH": str(libraries), "PATCHRANK_TRITON_PACKAGES": str(found)}
        command = [str(binary), f"--model-repository={self.repository}", f"--backend-directory={self.folder}/backends"]
        command += ["--model-control-mode=explicit", "--load-model=*", "--exit-timeout-secs=20"]
        for kind, port in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
            command += [f"--{kind}-port={port}", f"--{kind}-address=127.0.0.1"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder / "empty", env=environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + timeout
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"tritonserver is not ready: {self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)

    def ready(self) -> bool:
        """Whether the server and all its models take requests."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """SIGTERM, which lets requests in flight finish; SIGKILL after 30 s."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    def __enter__(self) -> "TritonServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    """The command line; returns the exit code of the command behind `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="model repository")
    parser.add_argument("--ports", type=int, nargs=3, default=(8000, 8001, 8002), help="HTTP, gRPC, metrics")
    words = sys.argv[1:]
    own, command = (words, []) if "--" not in words else (words[: words.index("--")], words[words.index("--") + 1 :])
    options = parser.parse_args(own)
    try:
        with TritonServer(options.repository, tuple(options.ports)) as server:
            print(f"tritonserver: http 127.0.0.1:{server.http}, grpc :{server.grpc}, metrics :{server.metrics}")
            if command:
                return subprocess.run(command).returncode
            server.process.wait()
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
