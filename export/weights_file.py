"""Weights of several graphs in one file beside them: equal tensors are stored once (ONNX external data).

The file is named by its content and each graph names its file, so a graph that is being replaced never meets the
weights of another one.
"""

import hashlib
import os
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data

_PAGE = 4096
"""Tensors start on a page, so that a runtime can map them."""
_SMALL = 1024
"""Tensors below this many bytes stay inside the graph."""


def tensor_bytes(tensor: onnx.TensorProto) -> bytes:
    """Raw little-endian content."""
    return tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()


class WeightsFile:
    """Collects tensors into one open file; `finish` gives it its name."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = Path(folder), prefix
        self._path = self.folder / f".{prefix}.bin"
        self._file = open(self._path, "wb")  # noqa: SIM115 (closed in finish)
        self._offsets: dict[bytes, tuple[int, int]] = {}
        self._digest = hashlib.sha256()
        self._waiting: list[tuple[onnx.ModelProto, Path]] = []

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            gap = bytes(-self._file.tell() % _PAGE)
            self._offsets[key] = (self._file.tell() + len(gap), len(data))
            self._file.write(gap + data)
            self._digest.update(gap + data)
        return self._offsets[key]

    def add(self, model: onnx.ModelProto, name: str) -> None:
        """Move a graph's weights into the file; the graph itself is written as `name` by `finish`. Changes `model`."""
        for tensor in model.graph.initializer:
            data = tensor_bytes(tensor)
            if len(data) < _SMALL:
                continue
            offset, length = self._place(data)
            tensor.ClearField("float_data")
            tensor.ClearField("int32_data")
            tensor.ClearField("int64_data")
            tensor.raw_data = b""
            set_external_data(tensor, location="pending", offset=offset, length=length)
            tensor.ClearField("raw_data")
        self._waiting.append((model, self.folder / name))

    def finish(self) -> list[Path]:
        """Write everything to disk: the weights' path first, then the graphs' in the order they came."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self.folder / f"{self.prefix}-{self._digest.hexdigest()[:12]}.bin"
        os.replace(self._path, path)
        for model, target in self._waiting:
            for tensor in model.graph.initializer:
                for item in tensor.external_data:
                    if item.key == "location":
                        item.value = path.name
            target.write_bytes(model.SerializeToString())
        return [path, *(target for _, target in self._waiting)]
