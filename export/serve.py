"""`python -m export.serve`: an export folder behind HTTP on this machine's processor, with a page to try it on.

KServe V2 (the protocol of Triton, so clients need not change), `POST /classify` for pictures as they are, `/metrics`.
Listens on loopback unless told otherwise: it has no accounts and no encryption.
"""

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from export.serve_app import build_app
from export.serve_folder import ServedFolder, open_model
from export.serve_models import open_runs
from export.serve_service import ServerLimits, Service
from patchrank import cli
from patchrank.errors import UserError

_CONNECTIONS = 1024
"""Clients that may stay connected without asking anything."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve an export folder over HTTP."""

    model: str = "embedded"
    """"embedded", or a folder that export.onnx_file wrote (with --tower text too, it takes class lists)."""
    precision: str = ""
    """One of the exported precisions; without it the first."""
    default: str = ""
    """Variant that answers if a request names none, as keep-0.6; without it the dearest one that is pruned."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback is open to the network, without accounts or encryption."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    threads: int = 1
    """Threads of one call."""
    workers: int = 1
    """Calls at a time."""
    max_batch: int = 32
    """Images of one call, and of one request."""
    max_delay: float = 2.0
    """Milliseconds that the first image of a batch waits for others."""
    max_queue: int = 64
    """Images inside the server; more are refused with status 429."""
    max_mib: float = 16.0
    """Size of one body in MiB."""
    max_pixels: int = 40_000_000
    """Pixels of one picture, read from its header before it is decoded."""
    max_classes: int = 200
    """Names of a request's own class list."""
    drain: int = 20
    """Seconds that requests inside get to finish after SIGTERM."""
    out: Path = Path("out/serve")
    """Folder of the embedded model's graphs, which are written at the first start."""


def check(config: ServeConfig) -> None:
    """Check all that needs no model. Raises: UserError."""
    for name in ("threads", "workers", "max_batch", "max_queue", "max_pixels", "drain"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    if config.max_classes < 2:
        raise UserError(f"--max-classes {config.max_classes}: must be 2 or more")
    if config.max_queue < config.max_batch:
        raise UserError(f"--max-queue {config.max_queue}: must hold one batch; give --max-batch {config.max_batch}")
    if config.max_delay < 0 or config.max_mib <= 0:
        raise UserError(f"--max-delay {config.max_delay:g} --max-mib {config.max_mib:g}: must not be negative or empty")
    if not 0 <= config.port <= 65535:
        raise UserError(f"--port {config.port}: must lie in 0 to 65535")


def limits_of(config: ServeConfig) -> ServerLimits:
    """The numbers that the routes hold clients to."""
    return ServerLimits(
        max_batch=config.max_batch,
        max_delay_s=config.max_delay / 1000,
        max_queue=config.max_queue,
        max_bytes=round(config.max_mib * 2**20),
        max_waiting_bytes=round(16 * config.max_mib * 2**20),
        max_pixels=config.max_pixels,
        max_classes=config.max_classes,
        workers=config.workers,
    )


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises: UserError for an address or port that is not to be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free one") from error
    return bound


def application(config: ServeConfig, folder: ServedFolder):
    """The ASGI application of a folder. Raises: UserError where the web framework is absent."""
    try:
        import starlette  # noqa: F401
    except ImportError as error:
        raise UserError("export.serve: starlette is absent; pip install 'patchrank[cpu,serve]'") from error
    limits = limits_of(config)
    # A page of another site could make a browser ask us under that site's name; only our own names are answered.
    hosts = ["127.0.0.1", "localhost", "::1", "[::1]", config.host] if is_loopback(config.host) else ["*"]
    return build_app(Service(folder, open_runs(folder, config.threads), limits), hosts)


def main(config: ServeConfig) -> None:
    """Load, listen, serve until SIGTERM or Ctrl-C; requests inside are answered first."""
    check(config)
    with listen(config.host, config.port) as bound:
        folder = open_model(config.model, config.out / "onnx", config.precision, config.default)
        app = application(config, folder)
        import uvicorn

        port = bound.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        if not is_loopback(config.host):
            print(f"--host {config.host}: everyone who reaches this address can use the server; it has no accounts")
        print(f"serving {', '.join(model.name for model in folder.variants)} on http://{host}:{port}/", flush=True)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=config.max_queue + _CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=config.drain,
            server_header=False,
        )
        uvicorn.Server(settings).run(sockets=[bound])


if __name__ == "__main__":
    cli.run(main, ServeConfig, prog="python -m export.serve")
