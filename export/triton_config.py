"""config.pbtxt of Triton models, as text: pure functions from a served model and a few numbers.

Source: Triton's `model_config.proto`, and the user guide's pages on model configuration and ensembles.
"""

from dataclasses import dataclass
from typing import Any

from export.serve_folder import ServedModel
from patchrank.errors import UserError

_TYPES = {"uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
LABELS = "labels.txt"


class Word(str):
    """An enumeration's value, or a number: printed without quotes."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server may do with the requests of one model."""

    max_batch: int = 64
    """Images of one call."""
    max_delay_ms: float = 2.0
    """How long the first image of a batch waits for others."""
    max_queue: int = 256
    """Requests that may wait; more are refused at once (HTTP 503, gRPC UNAVAILABLE)."""
    timeout_ms: float = 5000.0
    """A request that waited longer is refused."""
    instances: int = 1
    """Copies of the model that compute side by side."""
    threads: int = 1
    """Threads of each copy."""
    device: str = "auto"
    """auto, cpu or gpu."""


def text_of(fields: dict[str, Any], indent: str = "") -> str:
    """Protocol buffer text: a dictionary is a message, a list repeats its field, a `Word` or a number stands bare."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name} {{\n{text_of(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [text_of({name: item}, indent) for item in value]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return "[ " + ", ".join(_scalar(item) for item in value) + " ]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, Word)):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    if value["dtype"] not in _TYPES:
        raise UserError(f"{value['name']}: {value['dtype']} has no place in a Triton model; export it again")
    return {"name": value["name"], "data_type": Word(_TYPES[value["dtype"]]), "dims": list(value["shape"][1:])}


def tensors_of(model: ServedModel, labels: bool = False) -> dict[str, Any]:
    """`input` and `output`; with labels, the probabilities can be asked for as the best classes by name."""
    outputs = [_tensor(value) for value in model.record["outputs"]]
    for output in outputs:
        if labels and output["name"] == "probabilities":
            output["label_filename"] = LABELS
    return {"input": [_tensor(value) for value in model.record["inputs"]], "output": outputs}


def model_config(model: ServedModel, limits: Limits, *, engine: bool = False, labels: bool = False) -> str:
    """config.pbtxt of one graph (ONNX Runtime back end), or of the TensorRT engine made from it.

    The newest version serves; a request may name none. Warm-up runs the smallest and the largest batch, for the first
    call of a shape allocates memory.
    """
    fields: dict[str, Any] = {
        "name": model.name,
        "backend": "tensorrt" if engine else "onnxruntime",
        "max_batch_size": limits.max_batch,
        **tensors_of(model, labels),
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(1000 * limits.max_delay_ms),
            "default_queue_policy": {
                "timeout_action": Word("REJECT"),
                "default_timeout_microseconds": round(1000 * limits.timeout_ms),
                "max_queue_size": limits.max_queue,
            },
        },
        "instance_group": [{"kind": Word("KIND_GPU" if engine else KINDS[limits.device]), "count": limits.instances}],
        "model_warmup": [_warm_up(model, batch) for batch in sorted({1, limits.max_batch})],
    }
    if not engine:
        threads = {"key": "intra_op_thread_count", "value": {"string_value": str(limits.threads)}}
        fields["parameters"] = [threads]
    return text_of(fields)


def _warm_up(model: ServedModel, batch: int) -> dict[str, Any]:
    inputs = []
    for tensor in tensors_of(model)["input"]:
        value = {"data_type": tensor["data_type"], "dims": tensor["dims"], "zero_data": True}
        inputs.append({"key": tensor["name"], "value": value})
    return {"name": f"batch-{batch}", "batch_size": batch, "inputs": inputs}


def alias_config(alias: str, model: ServedModel, limits: Limits, labels: bool = False) -> str:
    """config.pbtxt of a second name: an ensemble of one step, which copies nothing and holds no weights."""
    tensors = tensors_of(model, labels)
    step = {"model_name": model.name, "model_version": -1}
    for kind in ("input", "output"):
        step[f"{kind}_map"] = [{"key": tensor["name"], "value": tensor["name"]} for tensor in tensors[kind]]
    fields = {"name": alias, "platform": "ensemble", "max_batch_size": limits.max_batch, **tensors}
    return text_of(fields | {"ensemble_scheduling": {"step": [step]}})
