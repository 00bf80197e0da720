"""float32 graph -> float16 or int8 graph. What decides which patches stay is left in float32 in both; in float16 the
residual stream is too.

Which nodes decide is read off the graph itself: everything that reaches an output only through the index of a TopK or
an ArgMax (scorer, covering selection, fold metric). The pixels and the answer stay float32 too.
"""

import numpy as np
import onnx

from export.half import to_float16
from export.int8 import to_int8, to_int8_static
from export.tidy import strip
from patchrank.errors import UserError

PRECISIONS = ("float32", "float16", "int8", "int8-static")
_INDEX_MAKERS = ("TopK", "ArgMax")
_SCOPES = "pkg.torch.onnx.name_scopes"


def selection_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that only decide which patches stay and who hosts the rest."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    data, waiting = set(), [value.name for value in model.graph.output]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and node.name not in data and node.op_type not in _INDEX_MAKERS:
            data.add(node.name)
            waiting += node.input
    return {node.name for node in model.graph.node} - data


def scoped_nodes(model: onnx.ModelProto, scopes: tuple[str, ...] = ("pixels", "answer")) -> set[str]:
    """Names of the nodes that came from these parts of the traced module."""
    found = set()
    for node in model.graph.node:
        path = next((item.value for item in node.metadata_props if item.key == _SCOPES), "")
        if any(f"'{scope}'" in path for scope in scopes):
            found.add(node.name)
    return found


def residual_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes on the residual stream: what a LayerNorm reads, back to the products that feed it, and itself.

    Every block adds a little to a large sum; in float16 the sum's rounding outweighs that of all products.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    found = {node.name for node in norms}
    waiting = [name for node in norms for name in node.input]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is None or node.name in found or node.op_type == "Conv" or _has_weights(node, constants):
            continue
        found.add(node.name)
        waiting += node.input
    return found


def _has_weights(node: onnx.NodeProto, constants: set[str]) -> bool:
    return node.op_type in ("MatMul", "Gemm") and any(name in constants for name in node.input)


def float32_nodes(model: onnx.ModelProto) -> set[str]:
    """All nodes that keep float32 in every precision."""
    return selection_nodes(model) | scoped_nodes(model)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def convert(model: onnx.ModelProto, precision: str, calibration: np.ndarray | None = None) -> onnx.ModelProto:
    """A traced float32 graph in the named precision, without the exporter's notes.

    Args: calibration, inputs (B, ...) of the graph, which int8 is measured on; "int8-static" needs them.
    Raises: UserError for an unknown name, weights outside it, or scales without inputs.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: unknown; choose one of {', '.join(PRECISIONS)}")
    rows = {
        "float32": _copy,
        "float16": lambda graph: to_float16(graph, float32_nodes(graph) | residual_nodes(graph)),
        "int8": lambda graph: to_int8(graph, float32_nodes(graph), calibration),
        "int8-static": lambda graph: to_int8_static(graph, float32_nodes(graph), calibration),
    }
    converted = rows[precision](model)
    strip(converted)
    return converted
