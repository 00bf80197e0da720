"""An export folder without a model: manifests as `export.onnx_file` writes them, and files of a few bytes."""

import json
from pathlib import Path

from patchrank.atomic import sha256_of
from patchrank.preprocess import Preprocess

CLASSES = ("zero", "one", "two")
SIZE = 32
_DIM = 4


def value(name: str, dtype: str, *shape: int) -> dict:
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape]}


def write_export(folder: Path, *, text: bool = True, classes: bool = True, content: str = "") -> Path:
    """Variants keep-1 and keep-0.5 of a tower of 16 patches; `content` makes other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "image-float32-0.bin").write_text("weights" + content)
    records = []
    for keep, macs in (("1", 100), ("0.5", 60)):
        outputs = [value("feature", "float32", _DIM)]
        if classes:
            outputs += [value("probabilities", "float32", 3), value("top5_probability", "float32", 3)]
            outputs.append(value("top5_index", "int64", 3))
        outputs += [value("kept", "int64", 8)] if keep != "1" else []
        name = f"image-keep-{keep}-float32.onnx"
        (folder / name).write_text(f"graph {keep}{content}")
        record = _record(folder, f"keep-{keep}", name, "image-float32-0.bin")
        record |= {"inputs": [value("image", "uint8", SIZE, SIZE, 3)], "outputs": outputs}
        records.append(record | {"image_macs": macs, "dense_image_macs": 100, "spec": {}})
    preprocess = Preprocess(image_size=(SIZE, SIZE), resize=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    manifest = {
        "kind": "patchrank export",
        "config": {"data": "digits", "keep": [1.0, 0.5], "template": "a photo of a {}."},
        "backbone": {
            "model": "tiny",
            "weights_hash": "0" + content,
            "config": {"image_size": [SIZE, SIZE], "patch_size": 8},
        },
        "preprocess": preprocess.to_dict(),
        "classes": {"names": list(CLASSES)} if classes else None,
        "models": records,
    }
    (folder / "image.json").write_text(json.dumps(manifest))
    if text:
        (folder / "text-float32.onnx").write_text("text" + content)
        (folder / "text-float32-0.bin").write_text("text weights")
        record = _record(folder, "text", "text-float32.onnx", "text-float32-0.bin")
        record |= {"inputs": [value("token", "int64", 16)], "outputs": [value("feature", "float32", _DIM)]}
        tokenizer = {"kind": "utf-8 bytes", "context": 16}
        text_manifest = {"kind": "patchrank export", "backbone": manifest["backbone"], "models": [record]}
        text_manifest |= {"tokenizer": tokenizer, "logit_scale": 20.0}
        (folder / "text.json").write_text(json.dumps(text_manifest))
    return folder


def _record(folder: Path, name: str, *files: str) -> dict:
    sums = {file: sha256_of(folder / file) for file in files}
    return {"name": name, "graph": files[0], "precision": "float32", "files": sums}
