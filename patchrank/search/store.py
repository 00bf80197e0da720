"""The ranking store: self-checking safetensors shards and one manifest, written whole or not at all.

    <store>/search.json            what was asked: model, weights hash, data, cut, criterion, strategy, seed, versions
    <store>/shards/00000.safetensors   order int16 (B, N), score float32 (B, N), trace float32 (B, N), ids in the header
    <store>/manifest.json          search.json + every shard's SHA-256; present only when the store is complete

Shard boundaries depend on the image list alone, so any number of ranks and any number of restarts give the same bytes.
"""

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchrank.atomic import sha256_of, write_json, write_tensors
from patchrank.errors import UserError
from patchrank.search.ranking import Ranking

SCHEMA = 1


class RankingMismatch(UserError):
    """A store that belongs to other weights, another cut or another request, or whose bytes are damaged."""


def fingerprint(request: dict) -> str:
    """Hex SHA-256 of a request's canonical JSON; every shard carries it."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def shard_path(store: Path, index: int) -> Path:
    """File of shard `index`."""
    return store / "shards" / f"{index:05d}.safetensors"


def write_shard(store: Path, index: int, request: dict, ids: list[str], broken: list[str], rankings: list[Ranking]):
    """Write one finished shard; `rankings` stand in the order of `ids`, `broken` lists images that were skipped."""
    num_patches = request["num_patches"]
    tensors = {
        "order": torch.stack([ranking.order_N for ranking in rankings]) if ids else torch.empty(0, num_patches).short(),
        "score": torch.stack([ranking.score_N for ranking in rankings]) if ids else torch.empty(0, num_patches),
        "trace": torch.stack([ranking.trace_N for ranking in rankings]) if ids else torch.empty(0, num_patches),
    }
    header = {"request": fingerprint(request), "ids": ids, "broken": broken, "sha256": _digest(tensors)}
    write_tensors(shard_path(store, index), tensors, {"patchrank": json.dumps(header)})


def read_shard(path: Path, request: dict) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors, ids and broken ids of a shard. Raises: RankingMismatch if damaged or of another request."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["patchrank"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        checksum, request_hash, ids, broken = (header[key] for key in ("sha256", "request", "ids", "broken"))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RankingMismatch(f"{path}: not a readable shard ({error}); delete it and search again") from None
    if checksum != _digest(tensors) or any(len(tensor) != len(ids) for tensor in tensors.values()):
        raise RankingMismatch(f"{path}: wrong checksum; delete this file and search again, other shards stay valid")
    if request_hash != fingerprint(request):
        raise RankingMismatch(f"{path}: belongs to another search; use another --out, or delete the old store")
    return tensors, ids, broken


def read_json(path: Path) -> dict:
    """A JSON object of the store. Raises: RankingMismatch if it does not read as one."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RankingMismatch(f"{path}: damaged ({error}); delete it and run the search again") from None
    if not isinstance(value, dict):
        raise RankingMismatch(f"{path}: holds no JSON object; delete it and run the search again")
    return value


def check_request(store: Path, request: dict) -> None:
    """Check, without writing, that the store is new or was begun by this request. Raises: RankingMismatch."""
    path = store / "search.json"
    if not path.exists():
        return
    known, asked = read_json(path), json.loads(json.dumps(request))
    if known != asked:
        differing = ", ".join(
            f"{key} {_short(known.get(key))} (now {_short(asked.get(key))})"
            for key in sorted(known.keys() | asked.keys())
            if known.get(key) != asked.get(key)
        )
        raise RankingMismatch(f"{store}: was begun with other settings: {differing}; use another --out, or delete it")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def begin(store: Path, request: dict, num_shards: int) -> None:
    """Create the store, or accept it if it was begun by the same request. Raises: RankingMismatch otherwise.

    A manifest whose shards are no longer all there says nothing and is taken away.
    """
    check_request(store, request)
    if not (store / "search.json").exists():
        write_json(store / "search.json", request)
    manifest = store / "manifest.json"
    if manifest.exists() and not all(shard_path(store, index).exists() for index in range(num_shards)):
        manifest.unlink(missing_ok=True)


def is_complete(store: Path, request: dict) -> bool:
    """Whether this request's search is already finished there. Raises: RankingMismatch for another request's store."""
    check_request(store, request)
    path = store / "manifest.json"
    return path.exists() and all((store / shard["file"]).exists() for shard in read_json(path).get("shards", []))


def complete(store: Path, request: dict, num_shards: int) -> bool:
    """Write the manifest if all shards are there; True for the one process that wrote it.

    Raises: RankingMismatch naming a damaged shard.
    """
    paths = [shard_path(store, index) for index in range(num_shards)]
    if not all(path.exists() for path in paths):
        return False
    shards, num_images, broken = [], 0, []
    for path in paths:
        _, ids, missing = read_shard(path, request)
        shards.append({"file": f"shards/{path.name}", "sha256": sha256_of(path), "num_images": len(ids)})
        num_images += len(ids)
        broken += missing
    manifest = request | {"num_images": num_images, "broken": broken, "shards": shards}
    for leftover in [*(store / "shards").glob(".*.tmp"), *store.glob(".search.json.*.tmp")]:  # of killed processes
        leftover.unlink(missing_ok=True)
    return _create_json(store / "manifest.json", manifest)


def _create_json(path: Path, value: dict) -> bool:
    """Write a JSON file whole, unless it is there already; True for the one process that made it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the last of several writers wins, with the same bytes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


@dataclass(frozen=True)
class RankingStore:
    """A complete (or, on request, partial) store in memory: orders (B, N), scores (B, N), traces (B, N), ids."""

    request: dict
    ids: list[str]
    broken: list[str]
    order_BN: Tensor
    score_BN: Tensor
    trace_BN: Tensor

    def index(self, image_ids: list[str]) -> Tensor:
        """Rows (len(image_ids),) of these images. Raises: RankingMismatch naming an image that is not in the store."""
        row = {image_id: i for i, image_id in enumerate(self.ids)}
        missing = [image_id for image_id in image_ids if image_id not in row]
        if missing:
            raise RankingMismatch(f"{missing[0]}: has no ranking in this store; search this data set first")
        return torch.tensor([row[image_id] for image_id in image_ids], dtype=torch.int64)


def open_store(
    folder: str | Path, *, weights_hash: str | None = None, layer: int | None = None, partial: bool = False
) -> RankingStore:
    """Read and check a store.

    Args: weights_hash, layer: refuse a store of other weights or another cut; partial: accept an unfinished store.
    Raises: RankingMismatch for a store that does not fit, is damaged or unfinished.
    """
    folder = Path(folder)
    name = "search.json" if partial else "manifest.json"
    if not (folder / name).exists():
        raise RankingMismatch(f"{folder}: no {name} there; run python -m patchrank.search --out {folder} to its end")
    manifest = read_json(folder / name)
    request = {key: value for key, value in manifest.items() if key not in ("num_images", "broken", "shards")}
    if request.get("schema") != SCHEMA or not {"weights_hash", "layer", "num_patches"} <= request.keys():
        raise RankingMismatch(f"{folder / name}: schema {request.get('schema')}, not {SCHEMA}; search again")
    if weights_hash is not None and request["weights_hash"] != weights_hash:
        raise RankingMismatch(
            f"{folder}: made with weights {request['weights_hash'][:12]}, this model has {weights_hash[:12]}; "
            "search again with this model"
        )
    if layer is not None and request["layer"] != layer:
        raise RankingMismatch(
            f"{folder}: made for layer {request['layer']}, not {layer}; search again with --layer {layer}"
        )
    if partial:
        paths = sorted((folder / "shards").glob("*.safetensors"))
    else:
        paths = [folder / shard["file"] for shard in manifest.get("shards", [])]
        for path, shard in zip(paths, manifest.get("shards", [])):
            if not path.exists() or sha256_of(path) != shard["sha256"]:
                raise RankingMismatch(f"{path}: absent or wrong checksum; delete it and run the search again")
    parts = [read_shard(path, request) for path in paths]
    ids = [image_id for _, part, _ in parts for image_id in part]
    broken = [image_id for _, _, part in parts for image_id in part]
    empty = torch.empty(0, request["num_patches"])
    stacked = {
        name: torch.cat([empty.to(dtype), *(tensors[name] for tensors, _, _ in parts)])
        for name, dtype in (("order", torch.int16), ("score", torch.float32), ("trace", torch.float32))
    }
    return RankingStore(request, ids, broken, stacked["order"], stacked["score"], stacked["trace"])
