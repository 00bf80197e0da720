"""Runtimes that a graph is compared and timed in, all behind one call: images in, named outputs out.

ONNX Runtime is the reference of every export; OpenVINO is the second one (extra `openvino`). Both compute in the type
that the graph says, so a float32 graph never silently runs in bfloat16.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from patchrank.errors import UserError

BATCHES = (1, 5, 16)
"""Batch sizes that a graph is compared at."""


@dataclass(frozen=True)
class Runner:
    """A graph that is ready to run."""

    runtime: str
    output_names: tuple[str, ...]
    run: Callable[[np.ndarray, tuple[str, ...]], list[np.ndarray]]
    """(input (B, ...), names of outputs) -> those outputs."""


_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_NO_CUDA = "--runtime onnxruntime-cuda: needs an NVIDIA GPU and pip install 'patchrank[gpu]' in place of [cpu]"


def open_session(model: Path | bytes, threads: int | None = None, quiet: bool = False, provider: str = _CPU):
    """An ONNX Runtime session of a file or a serialised graph; `threads` as many as PyTorch uses if None.

    Args: quiet, for a server, whose clients are told of their own wrong input: nothing but fatal errors is logged.

    Its threads stop spinning when a call ends: a process that holds several sessions (a server with several keep rates,
    a benchmark) would otherwise lose a core to the idle ones for a while after every call.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 4 if quiet else 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def _runner(runtime: str, session) -> Runner:
    (name,) = (value.name for value in session.get_inputs())
    outputs = tuple(value.name for value in session.get_outputs())
    return Runner(runtime, outputs, lambda image, names: session.run(list(names), {name: image}))


def _onnxruntime(path: Path, threads: int | None) -> Runner:
    return _runner("onnxruntime", open_session(path, threads))


def _onnxruntime_cuda(path: Path, threads: int | None) -> Runner:
    """Pixels and outputs cross the bus, as they do in a server. Not executed yet: no GPU was at hand."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    session = open_session(path, threads, provider=_CUDA)
    if session.get_providers()[0] != _CUDA:  # providers are listed as available that cannot load
        raise UserError(_NO_CUDA)
    return _runner("onnxruntime-cuda", session)


def _openvino(path: Path, threads: int | None) -> Runner:
    import openvino

    threads = torch.get_num_threads() if threads is None else threads
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", hints | {"PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    outputs = tuple(port.get_any_name() for port in compiled.outputs)

    def run(image: np.ndarray, names: tuple[str, ...]) -> list[np.ndarray]:
        request.infer([image], share_inputs=True)
        return [request.get_tensor(name).data.copy() for name in names]

    return Runner("openvino", outputs, run)


RUNTIMES: dict[str, Callable[[Path, int | None], Runner]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "onnxruntime-cuda": _onnxruntime_cuda,
}
"""Name -> opener (graph file, threads); the name up to a dash is also that of the Python package."""


def check_runtimes(names: tuple[str, ...]) -> None:
    """Raise UserError for an unknown or absent runtime, with what to install."""
    extras = {"onnxruntime": "cpu", "openvino": "openvino", "onnxruntime-cuda": "gpu"}
    if not names:
        raise UserError(f"--runtime: names none; choose from {', '.join(RUNTIMES)}")
    for name in names:
        if name not in RUNTIMES:
            raise UserError(f"--runtime {name}: unknown; choose one of {', '.join(RUNTIMES)}")
        if importlib.util.find_spec(name.partition("-")[0]) is None:
            raise UserError(f"--runtime {name}: not installed; pip install 'patchrank[{extras[name]}]'")
        if name == "onnxruntime-cuda" and not _sees_cuda():
            raise UserError(_NO_CUDA)


def _sees_cuda() -> bool:
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()


def run_in_batches(runner: Runner, image_BHW3: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Outputs of all images by name, computed `batch` at a time; the last call may hold fewer."""
    starts = range(0, len(image_BHW3), batch)
    calls = [runner.run(image_BHW3[start : start + batch], runner.output_names) for start in starts]
    return {name: np.concatenate(parts) for name, parts in zip(runner.output_names, zip(*calls))}
