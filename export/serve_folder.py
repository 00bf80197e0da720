"""An export folder as the serving commands see it: which graphs there are, what they are called, what goes in and out.

Both servers (`export.serve`, Triton) use the same model names, so that a client may talk to either:
`patchrank-<variant>` for each variant, `patchrank` for the default one, `patchrank-text` for the text tower.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.config import ExportConfig
from export.onnx_file import export
from export.publish import read_manifest
from patchrank import __version__
from patchrank.atomic import sha256_of
from patchrank.data.catalog import CATALOG
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.preprocess import Preprocess

ALIAS = "patchrank"
"""The default variant's second name."""
TEXT = f"{ALIAS}-text"
EMBEDDED_KEEP = (1.0, 0.6, 0.4)
"""Variants of the embedded model: the dense tower and two shares of its patches."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One graph under its name on a server."""

    name: str
    graph: Path
    record: dict[str, Any]
    """Its entry in the manifest."""

    @property
    def weights(self) -> list[Path]:
        """The files beside the graph that it reads."""
        return [self.graph.parent / name for name in self.record["files"] if name != self.graph.name]

    @property
    def macs_share(self) -> float:
        """Multiply-accumulates of an image over those of the dense tower; 1 for a text tower."""
        return self.record.get("image_macs", 1) / self.record.get("dense_image_macs", 1)


@dataclass(frozen=True, kw_only=True)
class ServedFolder:
    """Everything in one export folder, in one precision."""

    path: Path
    manifest: dict[str, Any]
    """Of the image towers."""
    text_manifest: dict[str, Any] | None
    variants: list[ServedModel]
    """Image towers, the dearest first."""
    text: ServedModel | None
    default: ServedModel

    @property
    def preprocess(self) -> Preprocess:
        """From a picture to the size of the graphs' input."""
        return Preprocess.from_dict(self.manifest["preprocess"])

    @property
    def class_names(self) -> list[str]:
        """The class list inside the graphs; empty without one."""
        return list((self.manifest.get("classes") or {}).get("names", []))

    @property
    def template(self) -> str:
        """Prompt around the names of a request's own class list."""
        row = CATALOG.get(self.manifest["config"]["data"])
        return row.template if row is not None else self.manifest["config"]["template"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        config = self.manifest["backbone"]["config"]
        height, width = config["image_size"]
        return height // config["patch_size"], width // config["patch_size"]


def open_folder(path: Path, precision: str = "", default: str = "") -> ServedFolder:
    """Read an export folder and check its files' checksums.

    Args: precision, one that was exported (default: the first); default, the variant behind the name without a suffix
    (default: the dearest one that is pruned).
    Raises: UserError for a folder that no export wrote, damaged files, an unknown precision or variant.
    """
    manifest, text_manifest = read_manifest(path / "image.json"), read_manifest(path / "text.json")
    if manifest.get("kind") != "patchrank export":
        raise UserError(f"--model {path}: holds no export; write one: python -m export.onnx_file --out {path}")
    known = list(dict.fromkeys(record["precision"] for record in manifest["models"]))
    precision = precision or known[0]
    if precision not in known:
        raise UserError(f"--precision {precision}: not in {path}; choose one of {', '.join(known)}")
    variants = [_model(path, record) for record in manifest["models"] if record["precision"] == precision]
    variants.sort(key=lambda model: -model.macs_share)
    if text_manifest and text_manifest["backbone"]["weights_hash"] != manifest["backbone"]["weights_hash"]:
        raise UserError(f"--model {path}: image.json and text.json are of different weights; export both again")
    texts = [_model(path, record) for record in text_manifest.get("models", [])]
    text = next((model for model in texts if model.record["precision"] == precision), texts[0] if texts else None)
    return ServedFolder(
        path=path,
        manifest=manifest,
        text_manifest=text_manifest or None,
        variants=variants,
        text=text and replace(text, name=TEXT),
        default=_default(variants, default),
    )


def _model(path: Path, record: dict[str, Any]) -> ServedModel:
    for name, digest in record["files"].items():
        if not (path / name).is_file() or sha256_of(path / name) != digest:
            raise UserError(f"--model {path}: {name} is absent or damaged; export it again")
    return ServedModel(name=f"{ALIAS}-{record['name']}", graph=path / record["graph"], record=record)


def _default(variants: list[ServedModel], name: str) -> ServedModel:
    if not name:
        return next((model for model in variants if model.macs_share < 1), variants[0])
    for model in variants:
        if name in (model.name, model.record["name"]):
            return model
    raise UserError(f"--default {name}: unknown; choose one of {', '.join(m.record['name'] for m in variants)}")


def export_embedded(out: Path) -> None:
    """Make `out` hold the embedded model's towers, image and text; an export of these weights is left as it is."""
    clip = load_clip("embedded")
    if _is_current(out, clip.weights_hash):
        return
    print(f"exporting the embedded model to {out}; this happens once and takes half a minute")
    export(ExportConfig(keep=EMBEDDED_KEEP, out=out), clip)
    export(ExportConfig(tower="text", out=out), clip)


def _is_current(out: Path, weights_hash: str) -> bool:
    """Whether `out` holds, whole, what `export_embedded` would write."""
    try:
        folder = open_folder(out)
    except (UserError, LookupError):
        return False
    wanted = weights_hash, __version__, list(EMBEDDED_KEEP)
    manifest = folder.manifest
    found = manifest["backbone"]["weights_hash"], manifest["versions"]["patchrank"], manifest["config"]["keep"]
    return found == wanted and folder.text is not None


def open_model(model: str, embedded: Path, precision: str = "", default: str = "") -> ServedFolder:
    """`open_folder` of a folder, or of the embedded model's own export in `embedded`, which is made if it is absent.

    Raises: UserError for a model that is neither.
    """
    if model == "embedded":
        export_embedded(embedded)
        return open_folder(embedded, precision, default)
    if not Path(model).is_dir():
        raise UserError(
            f"--model {model}: must be a folder that export wrote; python -m export.onnx_file --model {model} --out DIR"
        )
    return open_folder(Path(model), precision, default)
