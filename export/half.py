"""float32 graph -> strongly typed float16 graph: every edge has one type, with a Cast where two parts of it meet.

TensorRT 11 takes precision from the graph and nowhere else, so this file decides it for every runtime.
"""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from patchrank.errors import UserError

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_ALWAYS_FLOAT = ("ReduceL2", "Clip", "Constant", "ConstantOfShape", "Range")
"""A sum of squares and a small bound leave the range of float16; the others make constants typed by an attribute."""


def to_float16(model: onnx.ModelProto, keep_float32: set[str]) -> onnx.ModelProto:
    """Copy of a graph with weights and arithmetic in float16, inputs and outputs as they were.

    Args: keep_float32, names of nodes that stay as they are. LayerNormalization sums in float32 by definition.
    Raises: UserError for a weight outside the range of float16.
    """
    copy = onnx.shape_inference.infer_shapes(model)
    return _Half(copy, keep_float32).convert()


class _Half:
    def __init__(self, model: onnx.ModelProto, keep_float32: set[str]) -> None:
        self.model, self.graph = model, model.graph
        self.keep = keep_float32 | {node.name for node in self.graph.node if node.op_type in _ALWAYS_FLOAT}
        values = (*self.graph.value_info, *self.graph.input, *self.graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types |= {name: tensor.data_type for name, tensor in self.weights.items()}
        self.outputs = {value.name for value in self.graph.output}
        self.half_names: dict[str, str] = {}
        """Value of the given graph -> its float16 form, where it is computed in float16."""
        self.nodes: list[NodeProto] = []
        self.casts: dict[tuple[str, bool], str] = {}
        self.half_weights: dict[str, str] = {}

    def convert(self) -> onnx.ModelProto:
        for node in self.graph.node:
            half = node.name not in self.keep
            node.input[:] = [self._read(name, half) for name in node.input]
            self.nodes.append(node)
            if half:
                self._set_cast_target(node)
                node.output[:] = [self._write(name) for name in node.output]
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        return self.model

    def _write(self, name: str) -> str:
        """Name of a node's float16 output; a graph output keeps its own name and type through a Cast."""
        if self.types.get(name) != _FLOAT:
            return name
        self.half_names[name] = f"{name}_half" if name in self.outputs else name
        if name in self.outputs:
            self._cast(f"{name}_half", name, _FLOAT)
        return self.half_names[name]

    def _read(self, name: str, half: bool) -> str:
        """Name under which a float16 or a float32 node finds this value."""
        if self.types.get(name) != _FLOAT:
            return name
        if name in self.weights:
            return self._half_weight(name) if half else name
        if half and name in self.half_names:
            return self.half_names[name]
        if not half and (name not in self.half_names or name in self.outputs):
            return name
        if (name, half) not in self.casts:
            self.casts[name, half] = f"{name}_as_{'half' if half else 'float'}"
            self._cast(name, self.casts[name, half], _HALF if half else _FLOAT)
        return self.casts[name, half]

    def _cast(self, source: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"{source}_to_{target}", to=to))

    def _half_weight(self, name: str) -> str:
        if name not in self.half_weights:
            full = numpy_helper.to_array(self.weights[name])
            finite = np.abs(full[np.isfinite(full)])
            if finite.size and finite.max() > np.finfo(np.float16).max:
                raise UserError(f"weight {name}: {finite.max():g} is outside float16; use --precision float32 or int8")
            self.half_weights[name] = f"{name}_half"
            self.graph.initializer.append(numpy_helper.from_array(full.astype(np.float16), f"{name}_half"))
        return self.half_weights[name]

    @staticmethod
    def _set_cast_target(node: NodeProto) -> None:
        for item in node.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i == _FLOAT:
                item.i = _HALF
