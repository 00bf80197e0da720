"""Passes over an ONNX graph that keep every value and take out work: row gathers, narrow TopK, idle broadcasts."""

from collections import defaultdict

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


class Graph:
    """Who makes and who reads every value of a graph, and what is constant."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.opset = next(entry.version for entry in model.opset_import if not entry.domain)
        self.made_by = {name: node for node in self.proto.node for name in node.output}
        self.read_by: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                self.read_by[name].append(node)
        self.initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.outputs = {value.name for value in self.proto.output}
        values = (*self.proto.value_info, *self.proto.input, *self.proto.output)
        self._shapes = {value.name: _shape(value) for value in values}

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """Sizes of a value, numbers or names; None where the graph does not say."""
        return tuple(self.initializers[name].dims) if name in self.initializers else self._shapes.get(name)

    def constant(self, name: str) -> np.ndarray | None:
        """A small constant's value."""
        return numpy_helper.to_array(self.initializers[name]) if name in self.initializers else None

    def maker(self, name: str, op_type: str) -> NodeProto | None:
        """The node of this type that makes a value."""
        node = self.made_by.get(name)
        return node if node is not None and node.op_type == op_type else None

    def rename(self, old: str, new: str) -> None:
        """Let every reader of `old` read `new`."""
        for node in self.read_by.pop(old, []):
            node.input[:] = [new if name == old else name for name in node.input]
            self.read_by[new].append(node)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims)


def attribute(node: NodeProto, name: str, default=None):
    """Value of a node's attribute."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def fold_constants(graph: Graph) -> None:
    """Slices and transposes of weights are computed now: products then read stored weights, as quantisers ask."""
    for node in graph.proto.node:
        if node.op_type not in ("Slice", "Transpose") or not all(name in graph.initializers for name in node.input):
            continue
        inputs = [numpy_helper.to_array(graph.initializers[name]) for name in node.input]
        (value,) = ReferenceEvaluator(node, opsets={"": graph.opset}).run(None, dict(zip(node.input, inputs)))
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), node.output[0])
        graph.proto.initializer.append(tensor)
        graph.initializers[tensor.name] = tensor


def gather_rows(graph: Graph) -> None:
    """GatherElements whose index is one column repeated over channels -> GatherND of whole rows."""
    for node in graph.proto.node:
        if node.op_type != "GatherElements" or attribute(node, "axis", 0) != 1:
            continue
        expand = graph.maker(node.input[1], "Expand")
        column = graph.maker(expand.input[0], "Unsqueeze") if expand else None
        axes = graph.constant(column.input[1]) if column else None
        rank = len(graph.shape(node.input[0]) or ())
        if rank == 3 and axes is not None and axes.tolist() in ([-1], [2]):
            node.op_type = "GatherND"
            node.ClearField("attribute")
            node.attribute.append(helper.make_attribute("batch_dims", 1))
            node.input[1] = column.output[0]


def drop_idle_expands(graph: Graph) -> None:
    """x / Expand(y) -> x / y where x has the full shape already: the operator broadcasts by itself."""
    for node in graph.proto.node:
        if node.op_type not in ("Div", "Mul", "Add", "Sub"):
            continue
        for here, there in ((0, 1), (1, 0)):
            expand, full = graph.maker(node.input[here], "Expand"), graph.shape(node.input[there])
            if expand and full and "?" not in full and graph.shape(node.input[here]) == full:
                node.input[here] = expand.input[0]


def narrow_top_k(graph: Graph) -> None:
    """TopK of everything of which only the first K are read -> TopK of K."""
    for node in [node for node in graph.proto.node if node.op_type == "TopK"]:
        values, order = node.output
        slices = list(graph.read_by[order])
        if graph.read_by[values] or {values, order} & graph.outputs or not slices:
            continue
        ends = {_first(graph, item) for item in slices}
        if len(ends) != 1 or None in ends:
            continue
        (K,) = ends
        name = f"{node.name}_k"
        graph.proto.initializer.append(numpy_helper.from_array(np.array([K], dtype=np.int64), name))
        node.input[1] = name
        if any(item.output[0] in graph.outputs for item in slices):
            continue  # slicing K of K is idle but right
        for item in slices:
            graph.rename(item.output[0], order)


def _first(graph: Graph, node: NodeProto) -> int | None:
    """K of a slice `[:, :K]`."""
    if node.op_type != "Slice":
        return None
    start, end, axes = (graph.constant(name) for name in node.input[1:4])
    steps = graph.constant(node.input[4]) if len(node.input) > 4 else np.array([1])
    parts = (start, end, axes, steps)
    if any(part is None or part.size != 1 for part in parts):
        return None
    start, end, axis, step = (int(part.item()) for part in parts)
    return end if (start, step) == (0, 1) and axis in (1, -1) and end > 0 else None


def transpose_keys_directly(graph: Graph) -> None:
    """Reshape to 3 axes, swap the last two, reshape back -> one Transpose of 4 axes; runtimes fuse it with MatMul."""
    for node in graph.proto.node:
        swap = graph.maker(node.input[0], "Transpose") if node.op_type == "Reshape" else None
        flat = graph.maker(swap.input[0], "Reshape") if swap and attribute(swap, "perm") == [0, 2, 1] else None
        keys = flat.input[0] if flat else ""
        if len(graph.shape(keys) or ()) == 4 and _is_shape_of(graph, flat.input[1], keys, 3):
            if not _is_shape_of(graph, node.input[1], keys, 3):
                continue
            node.op_type = "Transpose"
            node.ClearField("attribute")
            node.attribute.append(helper.make_attribute("perm", [0, 1, 3, 2]))
            node.input[:] = [keys]


def _is_shape_of(graph: Graph, name: str, of: str, num_parts: int) -> bool:
    """Whether `name` is put together from parts of the shape of the value `of`, and constants."""
    concat = graph.maker(name, "Concat")
    if concat is None or len(concat.input) != num_parts:
        return False
    for part in concat.input:
        piece = graph.maker(part, "Slice")
        source = graph.maker(piece.input[0], "Shape") if piece else None
        if part not in graph.initializers and (source is None or source.input[0] != of):
            return False
    return True


def widen_attention_masks(graph: Graph) -> None:
    """Attention's mask (B, 1, 1, L) -> (B, 1, Q, L): ONNX broadcasts, ONNX Runtime's CPU kernel does not."""
    nodes = list(graph.proto.node)
    for number, node in enumerate(nodes):
        if node.op_type != "Attention" or len(node.input) < 4 or not node.input[3]:
            continue
        mask, query = graph.shape(node.input[3]), graph.shape(node.input[0])
        if not mask or not query or mask[-2] != 1 or query[-2] == 1:
            continue
        ones, wide = f"{node.name}_rows", f"{node.name}_mask"
        graph.proto.initializer.append(numpy_helper.from_array(np.array([1, 1, query[-2], 1], dtype=np.int64), ones))
        nodes[number] = (helper.make_node("Expand", [node.input[3], ones], [wide], name=f"{node.name}_widen"), node)
        node.input[3] = wide
    flat = [item for entry in nodes for item in (entry if isinstance(entry, tuple) else (entry,))]
    if len(flat) != len(nodes):
        del graph.proto.node[:]
        graph.proto.node.extend(flat)


def order_gelu(graph: Graph) -> None:
    """x * (0.5 * (1 + erf)) -> (x * (1 + erf)) * 0.5: the same bits (halving is exact), and the form runtimes fuse."""
    for node in graph.proto.node:
        for here, there in ((0, 1), (1, 0)):
            halved = graph.maker(node.input[there], "Mul") if node.op_type == "Mul" else None
            if halved is None or len(graph.read_by[halved.output[0]]) != 1:
                continue
            half, one_plus = halved.input if graph.constant(halved.input[0]) is not None else halved.input[::-1]
            add, factor = graph.maker(one_plus, "Add"), graph.constant(half)
            if factor is None or factor.size != 1 or factor.item() != 0.5 or add is None:
                continue
            if any(graph.maker(name, "Erf") for name in add.input):
                halved.input[:] = [node.input[here], one_plus]
                node.input[:] = [halved.output[0], half]
                break


def drop_unread(model: onnx.ModelProto) -> None:
    """Remove nodes, initialisers and value infos that no output depends on."""
    needed = {value.name for value in model.graph.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output) - stored:
            needed |= set(node.input)
            kept.append(node)
    nodes = kept[::-1]
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)
    del model.graph.value_info[:]


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter noted for its own debugging, stack traces with local paths included."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.ClearField("doc_string")
    model.graph.ClearField("doc_string")
    graph = model.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


PASSES = (
    fold_constants,
    gather_rows,
    drop_idle_expands,
    narrow_top_k,
    transpose_keys_directly,
    widen_attention_masks,
    order_gelu,
)


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """All passes, then what they left unread is removed and shapes are inferred anew; changes and returns `model`."""
    for change in PASSES:
        change(Graph(model))
    drop_unread(model)
    return onnx.shape_inference.infer_shapes(model)
