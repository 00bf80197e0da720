"""How large the inputs of a graph's products become, measured on pictures: what int8 must make room for.

Letters: C input channels of a product.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.runtimes import open_session

PRODUCTS = ("MatMul", "Gemm")
_CHUNK = 8


@dataclass(frozen=True)
class Range:
    """Of one product's input, over all calibration inputs and rows."""

    largest_C: np.ndarray
    """Largest magnitude of every channel."""
    rms: float
    """Root mean square over everything."""

    @property
    def peak(self) -> float:
        """Largest magnitude in units of the root mean square: how much of an 8-bit scale one value takes up."""
        return float(self.largest_C.max() / max(self.rms, 1e-12))


def weighted_products(model: onnx.ModelProto) -> list[NodeProto]:
    """Products of something computed with a weight that is stored."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in PRODUCTS and node.input[1] in stored and node.input[0] not in stored
    ]


def input_ranges(model: onnx.ModelProto, calibration: np.ndarray) -> dict[str, Range]:
    """Value name -> range of every value that enters a weighted product.

    Args: calibration, inputs (B, ...) of the graph.
    """
    names = sorted({node.input[0] for node in weighted_products(model)})
    session = open_session(_watched(model, names).SerializeToString())
    feed = model.graph.input[0].name
    parts = []
    for start in range(0, len(calibration), _CHUNK):
        parts.append(session.run(_outputs(names), {feed: calibration[start : start + _CHUNK]}))
    found = {}
    for number, name in enumerate(names):
        largest_C = np.max([part[2 * number] for part in parts], axis=0)
        found[name] = Range(largest_C, float(np.sqrt(np.mean([part[2 * number + 1] for part in parts]))))
    return found


def _outputs(names: list[str]) -> list[str]:
    return [f"{name}_{kind}" for name in names for kind in ("largest", "square")]


def _watched(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A copy that gives, for every named value (..., C), its largest magnitude per channel and its mean square."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    ranks = _ranks(model)
    del graph.output[:]
    for name in names:
        leading = numpy_helper.from_array(np.arange(ranks[name] - 1), f"{name}_axes")
        graph.initializer.append(leading)
        steps = [
            ("Abs", [name], f"{name}_abs", {}),
            ("ReduceMax", [f"{name}_abs", leading.name], f"{name}_largest", {"keepdims": 0}),
            ("Mul", [name, name], f"{name}_squared", {}),
            ("ReduceMean", [f"{name}_squared"], f"{name}_square", {"keepdims": 0}),
        ]
        graph.node.extend(
            helper.make_node(kind, inputs, [output], name=output, **options) for kind, inputs, output, options in steps
        )
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in _outputs(names))
    return copy


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}
