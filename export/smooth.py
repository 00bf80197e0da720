"""Even out what int8 rounds: large channels of a LayerNorm's output become smaller, the weights behind it larger.

The product is the same in exact arithmetic: LayerNorm's scale and shift are divided by s, the rows of every weight that
reads them are multiplied by s. What cannot be evened out, because one value towers over all others, stays float32.
"""

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from export.ranges import PRODUCTS, Range, weighted_products

_SHARE = 0.5
"""How much of a channel's size moves into the weights."""


def towering(model: onnx.ModelProto, ranges: dict[str, Range], peak: float) -> set[str]:
    """Names of the products whose input has a value more than `peak` times its root mean square.

    One step of an 8-bit scale is then a good part of what most values are.
    """
    return {node.name for node in weighted_products(model) if ranges[node.input[0]].peak > peak}


def smooth(model: onnx.ModelProto, ranges: dict[str, Range]) -> onnx.ModelProto:
    """Copy of a graph with every LayerNormalization smoothed that only weighted products read.

    Source: Xiao et al. 2023 (SmoothQuant), section 4, equation 4, with migration strength 0.5.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in copy.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in copy.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for norm in [node for node in copy.graph.node if node.op_type == "LayerNormalization"]:
        products = readers.get(norm.output[0], [])
        if norm.output[0] in ranges and all(_weighs(node, norm.output[0], weights) for node in products):
            _move(copy, norm, products, ranges[norm.output[0]].largest_C, weights)
    read = {name for node in copy.graph.node for name in node.input}
    stored = [tensor for tensor in copy.graph.initializer if tensor.name in read]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(stored)
    return copy


def _weighs(node: NodeProto, name: str, weights: dict) -> bool:
    plain = node.op_type == "MatMul" or not any(item.name == "transB" and item.i for item in node.attribute)
    return node.op_type in PRODUCTS and plain and node.input[0] == name and node.input[1] in weights


def _move(model, norm: NodeProto, products: list[NodeProto], largest_C: np.ndarray, weights: dict) -> None:
    """Divide one LayerNorm by s and multiply its products' weights by s; shared tensors are copied first."""
    values = [numpy_helper.to_array(weights[node.input[1]]) for node in products]
    reach_C = np.max([np.abs(value).max(axis=1) for value in values], axis=0)
    scale_C = np.maximum(largest_C, 1e-5) ** _SHARE / np.maximum(reach_C, 1e-5) ** (1 - _SHARE)
    scale_C = (scale_C / np.exp(np.log(scale_C).mean())).astype(np.float32)
    for place in range(1, len(norm.input)):
        value = numpy_helper.to_array(weights[norm.input[place]]) / scale_C
        norm.input[place] = _store(model, f"{norm.name}_{place}_smooth", value, weights)
    for node, value in zip(products, values):
        node.input[1] = _store(model, f"{node.name}_smooth", value * scale_C[:, None], weights)


def _store(model, name: str, value: np.ndarray, weights: dict) -> str:
    tensor = numpy_helper.from_array(value.astype(np.float32), name)
    model.graph.initializer.append(tensor)
    weights[name] = model.graph.initializer[-1]
    return name
