"""The graphs of an export folder, loaded into ONNX Runtime, each behind a batcher of its own."""

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from export.runtimes import open_session
from export.serve_batcher import Arrays, Batcher, Run
from export.serve_folder import ServedFolder, ServedModel
from export.serve_metrics import Metrics
from export.serve_protocol import BadRequest, TensorSpec, specs_of

VERSION = "1"
"""The only version of every model here; Triton counts real ones."""


@dataclass(frozen=True)
class Loaded:
    """One model that takes requests."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    macs_share: float
    batcher: Batcher

    def metadata(self, name: str) -> dict:
        """As the KServe protocol tells it, under the name that was asked for."""
        return {
            "name": name,
            "versions": [VERSION],
            "platform": "onnxruntime_onnx",
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }


class Pool:
    """The threads that compute, shared by all models, so that the processor is never asked for more than it has."""

    def __init__(self, workers: int) -> None:
        self.executor = ThreadPoolExecutor(workers, thread_name_prefix="compute")
        self.slots = asyncio.Semaphore(workers)


def open_run(graph: Path, outputs: list[str], threads: int) -> Run:
    """Load a graph and warm it up with one row of zeros.

    What it returns raises BadRequest for values outside the model's range.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    session = open_session(graph, threads, quiet=True)

    def run(inputs: Arrays) -> Arrays:
        try:
            return dict(zip(outputs, session.run(outputs, inputs)))
        except InvalidArgument as error:  # such as a token id outside the vocabulary
            raise BadRequest("the model refuses these values") from error

    run({value.name: np.zeros((1, *value.shape[1:]), _NUMPY[value.type]) for value in session.get_inputs()})
    return run


_NUMPY = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(float)": np.float32}


def loaded(model: ServedModel, run: Run, pool: Pool, metrics: Metrics, *, max_batch: int, max_delay_s: float) -> Loaded:
    """A served model around what computes it."""
    batcher = Batcher(run, max_batch, max_delay_s, pool.executor, pool.slots, partial(metrics.saw_call, model.name))
    inputs, outputs = specs_of(model.record["inputs"]), specs_of(model.record["outputs"])
    return Loaded(model.name, inputs, outputs, model.macs_share, batcher)


def graphs_of(folder: ServedFolder) -> Iterable[ServedModel]:
    """All graphs that a server loads."""
    return [*folder.variants, *([folder.text] if folder.text else [])]


def open_runs(folder: ServedFolder, threads: int) -> dict[str, Run]:
    """Name -> what computes it, for all graphs of a folder."""
    return {
        model.name: open_run(model.graph, [value["name"] for value in model.record["outputs"]], threads)
        for model in graphs_of(folder)
    }
