"""The positive list: operators that an exported graph may hold. All of them run in ONNX Runtime, TensorRT and OpenVINO
with static shapes but for the batch; none branches, loops, scatters, or has a shape that depends on data."""

from collections import Counter

import onnx

from patchrank.errors import UserError

ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Erf", "Tanh", "Sigmoid", "Gelu", "Log", "Exp", "Clip", "Pow"}
COMPARISON = {"And", "Or", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "Max", "Min"}
REDUCTION = {"ReduceL2", "ReduceMean", "ReduceMax", "ReduceSum", "ArgMax", "Softmax", "LayerNormalization", "TopK"}
PRODUCT = {"MatMul", "Gemm", "Conv", "Attention", "Einsum"}
SHAPING = {"Reshape", "Transpose", "Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Identity"}
INDEXING = {"Gather", "GatherND", "GatherElements", "Shape", "Cast", "Constant", "ConstantOfShape", "Range"}
PLAIN = ARITHMETIC | COMPARISON | REDUCTION | PRODUCT | SHAPING | INDEXING
INT8 = {"DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear", "DequantizeLinear"}


def count_operators(model: onnx.ModelProto) -> Counter[str]:
    """Operator -> number of nodes; operators of another domain than ONNX's own stand with their domain."""
    return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node)


def check_operators(model: onnx.ModelProto, precision: str = "float32") -> None:
    """Raise UserError where a graph holds a node outside the positive list, naming the nodes."""
    allowed = PLAIN | (INT8 if precision.startswith("int8") else set())
    strays = [node for node in model.graph.node if node.domain or node.op_type not in allowed]
    if strays or model.functions:
        named = ", ".join(f"{node.op_type} ({node.name})" for node in strays[:5]) or model.functions[0].name
        raise UserError(
            f"{named}: not on the list of operators that run everywhere; a scorer must not branch, loop or scatter"
        )
