"""`python -m export.load`: latency of a server at rising load, with and without load-adaptive pruning.

Without --url it starts `export.serve` itself. Load is given as multiples of what the server can do with the dearest
variant, which is measured first. Every answer is compared with the same graph run here; loopback only, and bounded in
time and in requests. Exit code 1 if an answer was wrong or a request was lost.
"""

import asyncio
import sys
from contextlib import AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.client import Failed, KserveClient
from export.load_report import row_of, table
from export.load_run import arrivals, capacity, drive, idle_ms
from export.load_server import about, is_ready, own_server
from export.load_traffic import MODES, Reloads, Traffic
from export.load_truth import Truth, load_truth
from export.serve import is_loopback
from export.serve_folder import ALIAS, ServedFolder, open_model
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.provenance import command, machine, versions

_MAX_INSIDE = 512


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Measure a server at rising load, with and without load-adaptive pruning."""

    model: str = "embedded"
    """"embedded", or the folder that the server serves (export.onnx_file's)."""
    precision: str = ""
    """One of the exported precisions; without it the first. Not int8: its answers depend on the batch."""
    url: str = ""
    """host:port of a running server, Triton or export.serve; without it export.serve is started."""
    grpc: str = ""
    """host:port of the same server's gRPC; requests then take turns between the two."""
    load: tuple[float, ...] = (0.5, 0.8, 1.1, 1.4, 1.7)
    """Offered load, in multiples of what the server can do with the dearest variant."""
    seconds: float = 120.0
    """Length of the whole measurement."""
    target: float = 0.0
    """Milliseconds under which the adaptive client tries to stay; 0 stands for four times the idle server's latency."""
    batch: tuple[int, ...] = (1,)
    """Images of a request, drawn from these; name a size twice to draw it twice as often."""
    reload: float = 0.0
    """Reload a model of the server every so many seconds (Triton with --model-control-mode=explicit); 0: never."""
    max_requests: int = 200_000
    """Largest number of requests."""
    images: int = 64
    """Different images, spread over the classes."""
    data: str = ""
    """Data set of the images; without it the one that the export was compared on."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    split: str = "test"
    """Split of --data."""
    seed: int = 0
    """Seed of arrivals, sizes and images."""
    out: Path = Path("out/load")
    """Folder of serving_load.json."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; folders are reduced to their last part."""
        return asdict(self) | {"model": Path(self.model).name, "out": self.out.name, "data_root": None}


def check(config: LoadConfig) -> None:
    """Check all that needs neither model nor server. Raises: UserError."""
    for name in ("url", "grpc"):
        value = getattr(config, name)
        host, colon, port = value.rpartition(":")
        if value and not (colon and port.isdecimal() and is_loopback(host.strip("[]"))):
            raise UserError(f"--{name} {value}: must be host:port on this machine's loopback; load is for own servers")
    if config.grpc and not config.url:
        raise UserError(f"--grpc {config.grpc}: goes with --url, the same server's HTTP")
    if not config.load or min(config.load) <= 0:
        raise UserError(f"--load {' '.join(map(str, config.load))}: needs multiples above 0")
    if not config.batch or min(config.batch) < 1:
        raise UserError(f"--batch {' '.join(map(str, config.batch))}: needs sizes of 1 or more")
    if not 5 <= config.seconds <= 3600:
        raise UserError(f"--seconds {config.seconds:g}: must lie in 5 to 3600")
    if config.reload < 0 or (config.reload and not config.url):
        raise UserError(f"--reload {config.reload:g}: needs --url of a Triton server, and seconds above 0")
    if config.target < 0:
        raise UserError(f"--target {config.target:g}: must be 0 or more milliseconds")
    for name in ("max_requests", "images"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")


async def measure(config: LoadConfig, folder: ServedFolder, truth: Truth, url: str) -> dict[str, Any]:
    """All loads in both modes; the order of the modes turns from load to load."""
    rng = np.random.default_rng(config.seed)
    num_steps, warm_s = len(config.load) * len(MODES), config.seconds / 12
    length, budget = (config.seconds - warm_s) / num_steps, config.max_requests // num_steps
    steps = [(load, mode) for n, load in enumerate(config.load) for mode in (MODES if n % 2 else MODES[::-1])]
    rows = []
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(KserveClient(url, "http", _MAX_INSIDE))]
        if config.grpc:
            clients.append(await stack.enter_async_context(KserveClient(config.grpc, "grpc")))
        traffic = Traffic(clients, folder, truth)
        fixed, _ = traffic.ask("fixed", target_ms=1.0)
        idle = await idle_ms(fixed, truth)
        able = await capacity(fixed, truth, warm_s, inside=16)
        target = config.target or 4 * idle
        async with Reloads(clients[0].wire, [*traffic.ladder, ALIAS], config.reload) as reloads:
            for load, mode in tqdm(steps, desc="load", unit="stretch", disable=not sys.stderr.isatty()):
                ask, switches = traffic.ask(mode, target)
                plan = arrivals(load * able, length, config.batch, len(truth.ids), rng)[:budget]
                seen = await drive(plan, ask, truth, traffic.ladder[0], _MAX_INSIDE, patience_s=30)
                rows.append(row_of(folder, seen, mode=mode, load=load, offered=load * able, switches=switches()))
    rows.sort(key=lambda row: (row["load"], MODES.index(row["mode"])))
    return {
        "capacity_images_per_s": able,
        "idle_ms": idle,
        "target_ms": target,
        "reloads": reloads.counts,
        "reload_failure": reloads.failure,
        "rows": rows,
    }


def load(config: LoadConfig) -> dict[str, Any]:
    """Measure what `config` asks for; returns what serving_load.json holds. Raises: UserError."""
    check(config)
    folder = open_model(config.model, config.out / "onnx", config.precision)
    data = config.data or folder.manifest["config"]["data"]
    truth = load_truth(folder, data, config.data_root, config.split, config.images)
    flags = ("--precision", config.precision) if config.precision else ()
    server = nullcontext(config.url) if config.url else own_server(folder.path, config.out / "server.log", *flags)
    with server as url:
        if not is_ready(url):
            raise UserError(f"--url {url}: no server is ready there; start one: python -m export.serve")
        server_is = about(url, folder.variants[0].name)
        try:
            measured = asyncio.run(measure(config, folder, truth, url))
        except Failed as error:
            raise UserError(f"{url}: {error}; does it serve {folder.path}?") from error
    rows = measured["rows"]
    return {
        "command": command("export.load"),
        "versions": versions(),
        "machine": machine(),
        "server": server_is if config.url else server_is | {"threads": 1},
        "config": replace(config, data=data).to_dict(),
        "num_images": len(truth.ids),
        "unstable_images": truth.unstable,
        "limit": truth.limit,
        "local_accuracy": truth.accuracy(),
        "total": {name: sum(row[name] for row in rows) for name in ("num_requests", "refused", "lost", "wrong")},
        **measured,
    }


def main(config: LoadConfig) -> None:
    """Measure, write serving_load.json, print the table."""
    result = load(config)
    write_json(config.out / "serving_load.json", result)
    total = result["total"]
    print(f"idle: {result['idle_ms']:.1f} ms; the adaptive client tries to stay under {result['target_ms']:.1f} ms")
    print(table(result["rows"]))
    print(
        f"{total['num_requests']} requests: {total['wrong']} wrong, {total['lost']} lost, {total['refused']} refused; "
        f"{sum(result['reloads'].values())} reloads; {len(result['unstable_images'])} images left out as near-ties"
    )
    if total["wrong"] or total["lost"] or result["reload_failure"]:
        print(f"error: {result['reload_failure'] or 'answers were wrong or lost, see above'}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, LoadConfig, prog="python -m export.load")
