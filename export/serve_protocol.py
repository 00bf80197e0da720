"""KServe V2 inference requests and answers over HTTP: JSON, and raw tensors behind it, to arrays and back.

Source: the KServe "Open Inference Protocol", and Triton's binary tensor data extension, whose header gives the length
of the JSON part. Pure functions; nothing here knows a server. What a request may not hold (shared memory, sequences,
strings) is refused by name.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

HEADER = "Inference-Header-Content-Length"
_DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}


class BadRequest(ValueError):
    """A request outside the protocol, in one line; answered with status 400."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a model says about one input or output."""

    name: str
    dtype: str
    """NumPy's name, as in an export's manifest."""
    shape: tuple[int | str, ...]
    """Sizes; a name stands for the free batch."""

    @property
    def datatype(self) -> str:
        """The protocol's name of the type."""
        return _NAMES[np.dtype(self.dtype)]

    def to_dict(self) -> dict[str, Any]:
        """As model metadata: -1 stands for the batch."""
        return {
            "name": self.name,
            "datatype": self.datatype,
            "shape": [-1 if isinstance(size, str) else size for size in self.shape],
        }


def specs_of(values: list[dict[str, Any]]) -> list[TensorSpec]:
    """From the `inputs` or `outputs` of a manifest's record."""
    return [TensorSpec(name=v["name"], dtype=v["dtype"], shape=tuple(v["shape"])) for v in values]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked inference request."""

    id: str | None
    inputs: dict[str, np.ndarray]
    """One array per input of the model; the first axis is the same in all."""
    outputs: dict[str, bool]
    """Outputs asked for, in order -> whether as raw bytes."""

    @property
    def batch(self) -> int:
        """Rows of the request."""
        return len(next(iter(self.inputs.values())))


def parse(body: bytes, header: str | None, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Request:
    """A request's body, and the value of its HEADER, for a model with these inputs and outputs.

    Raises: BadRequest.
    """
    message, raw = _split(body, header)
    given = message.get("inputs")
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise BadRequest("inputs: must be a list of tensors")
    arrays, offset = {}, 0
    known = {spec.name: spec for spec in inputs}
    for item in given:
        name = item.get("name")
        if not isinstance(name, str) or name not in known:
            raise BadRequest(f"input {name!r}: unknown; this model takes {', '.join(known)}")
        if name in arrays:
            raise BadRequest(f"input {name!r}: is there twice")
        size = _binary_size(item)
        if size is None:
            arrays[name] = _from_json(item, known[name])
        else:
            arrays[name] = _from_bytes(item, known[name], raw[offset : offset + size], size)
            offset += size
    if offset != len(raw):
        raise BadRequest(f"{len(raw)} bytes follow the JSON part, the inputs' binary_data_size add up to {offset}")
    missing = [name for name in known if name not in arrays]
    if missing:
        raise BadRequest(f"input {missing[0]!r}: is missing")
    if len({len(array) for array in arrays.values()}) > 1:
        raise BadRequest("inputs: differ in their first axis, the batch")
    identifier = message.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadRequest("id: must be a string")
    return Request(id=identifier, inputs=arrays, outputs=_outputs(message, [spec.name for spec in outputs]))


def _split(body: bytes, header: str | None) -> tuple[dict[str, Any], bytes]:
    """The JSON part and the bytes behind it."""
    length = len(body)
    if header is not None:
        if not (header.isascii() and header.isdigit()) or int(header) > len(body):
            raise BadRequest(f"{HEADER}: {header[:20]!r} must be a number of bytes inside the body of {len(body)}")
        length = int(header)
    try:
        message = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({type(error).__name__})") from error
    if not isinstance(message, dict):
        raise BadRequest("the body must be a JSON object")
    return message, body[length:]


def _parameters(item: dict[str, Any]) -> dict[str, Any]:
    parameters = item.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest("parameters: must be an object")
    refused = [
        name for name in parameters if name.startswith(("shared_memory", "sequence")) or name == "classification"
    ]
    if refused:
        raise BadRequest(f"{refused[0]}: this server does not offer it")
    return parameters


def _binary_size(item: dict[str, Any]) -> int | None:
    size = _parameters(item).get("binary_data_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise BadRequest(f"binary_data_size: {size!r} must be a number of bytes")
    if size is not None and "data" in item:
        raise BadRequest("an input has both data and binary_data_size; give one")
    return size


def _shape(item: dict[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    """The shape a request gives, checked against the model's and its type."""
    shape, datatype = item.get("shape"), item.get("datatype")
    if datatype != spec.datatype:
        raise BadRequest(f"input {spec.name!r}: datatype {datatype!r}; this model takes {spec.datatype}")
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise BadRequest(f"input {spec.name!r}: shape must be a list of whole numbers")
    wanted = spec.to_dict()["shape"]
    fits = len(shape) == len(wanted) and all(w in (-1, n) for n, w in zip(shape, wanted)) and min(shape) > 0
    if not fits:
        raise BadRequest(f"input {spec.name!r}: shape {shape}; this model takes {wanted}, -1 for 1 or more")
    return tuple(shape)


def _from_bytes(item: dict[str, Any], spec: TensorSpec, raw: bytes, size: int) -> np.ndarray:
    shape, dtype = _shape(item, spec), np.dtype(spec.dtype)
    needed = math.prod(shape) * dtype.itemsize
    if not len(raw) == size == needed:
        raise BadRequest(f"input {spec.name!r}: {len(raw)} bytes for shape {list(shape)}; it takes {needed}")
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)


def _from_json(item: dict[str, Any], spec: TensorSpec) -> np.ndarray:
    """Numbers in a flat or a nested list; whole numbers must be whole and within the type's range."""
    shape = _shape(item, spec)
    dtype = np.dtype(spec.dtype)
    try:
        given = np.array(item.get("data"))
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"input {spec.name!r}: data is ragged") from error
    whole = np.issubdtype(dtype, np.integer)
    kinds = "iu" if whole else "b" if dtype == np.bool_ else "iuf"
    if given.dtype.kind not in kinds or given.size != math.prod(shape):
        what = "whole numbers" if whole else "true or false" if dtype == np.bool_ else "numbers"
        raise BadRequest(f"input {spec.name!r}: data must be {math.prod(shape)} {what}")
    if given.ndim > 1 and given.shape != shape:
        raise BadRequest(f"input {spec.name!r}: data is nested as {list(given.shape)}, shape says {list(shape)}")
    if whole and (given.min() < np.iinfo(dtype).min or given.max() > np.iinfo(dtype).max):
        raise BadRequest(f"input {spec.name!r}: data is outside the range of {spec.datatype}")
    return given.reshape(shape).astype(dtype)


def _outputs(message: dict[str, Any], known: list[str]) -> dict[str, bool]:
    """Names asked for; all of them where a request names none."""
    everything = bool(_parameters(message).get("binary_data_output", False))
    given = message.get("outputs")
    if given is None:
        return dict.fromkeys(known, everything)
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise BadRequest("outputs: must be a list of objects with a name")
    wanted = {}
    for item in given:
        if item.get("name") not in known:
            raise BadRequest(f"output {item.get('name')!r}: unknown; this model gives {', '.join(known)}")
        wanted[item["name"]] = bool(_parameters(item).get("binary_data", everything))
    return wanted


def answer(model: str, version: str, request: Request, values: dict[str, np.ndarray]) -> tuple[bytes, int | None]:
    """Body of an answer, and the length of its JSON part (None where all of it is JSON).

    Numbers that JSON cannot hold (NaN, infinities) are refused by `json`; a model that gives them is broken.
    """
    described, raw = [], []
    for name, binary in request.outputs.items():
        value = np.ascontiguousarray(values[name])
        entry: dict[str, Any] = {"name": name, "datatype": _NAMES[value.dtype], "shape": list(value.shape)}
        if binary:
            data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
            raw.append(data)
            entry["parameters"] = {"binary_data_size": len(data)}
        else:
            entry["data"] = value.ravel().tolist()
        described.append(entry)
    message: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        message["id"] = request.id
    head = json.dumps(message, allow_nan=False).encode()
    return head + b"".join(raw), len(head) if raw else None
