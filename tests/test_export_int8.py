"""int8: ranges, smoothing, what stays float32, and both forms of quantisation, on graphs written by hand."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.int8 import _suffices, decisions, to_int8, to_int8_static, waited_for
from export.operators import check_operators
from export.precision import convert, float32_nodes
from export.ranges import input_ranges, weighted_products
from export.runtimes import open_session
from export.smooth import smooth, towering
from export.tidy import tidy
from patchrank.errors import UserError

GENERATOR = np.random.default_rng(0)
NORM = """
g (float[batch, 6, 16] x) => (float[batch, 8] feature)
{
  n = LayerNormalization<axis = -1>(x, gamma, beta)
  a = MatMul(n, w1)
  b = Tanh(a)
  c = MatMul(b, w2)
  feature = ReduceMean<keepdims = 0>(c, one)
}
"""
CUT = """
g (float[batch, 6, 16] x) => (float[batch, 8] feature, int64[batch, 3] kept)
{
  n = LayerNormalization<axis = -1>(x, gamma, beta)
  a = MatMul(n, w1)
  logits = MatMul(a, w_score)
  score = Squeeze(logits, last)
  values, kept = TopK<axis = 1>(score, k)
  column = Unsqueeze(kept, last)
  rows = GatherND<batch_dims = 1>(a, column)
  c = MatMul(rows, w2)
  feature = ReduceMean<keepdims = 0>(c, one)
  best, index = TopK<axis = 1>(feature, k)
}
"""


def array(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def model_of(text: str, large: float = 1.0) -> onnx.ModelProto:
    """`large`: size of one channel behind the LayerNorm; its weights are as much smaller, as in real towers."""
    gamma, w1 = np.ones(16, dtype=np.float32), array(16, 32)
    gamma[3], w1[3] = large, w1[3] / large
    weights = dict(gamma=gamma, beta=0.1 * array(16), w1=w1, w2=array(32, 8), w_score=array(32, 1))
    weights |= dict(last=np.array([-1]), one=np.array([1]), k=np.array([3]))
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 18]>\n' + text)
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in weights.items() if name in read
    )
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return open_session(model.SerializeToString()).run(["feature"], {"x": x})[0]


def error(model: onnx.ModelProto, low: onnx.ModelProto, x: np.ndarray) -> float:
    return float(np.abs(run(low, x) - run(model, x)).max())


def test_ranges_are_those_of_the_values() -> None:
    model, x = model_of(NORM, large=20.0), array(11, 6, 16)
    found = input_ranges(model, x)
    assert sorted(found) == ["b", "n"]
    gamma, beta = (numpy_helper.to_array(model.graph.initializer[number]) for number in (0, 1))
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(found["n"].largest_C, np.abs(n).max((0, 1)), rtol=1e-4)
    chunks = [np.mean(n[start : start + 8] ** 2) for start in (0, 8)]
    assert found["n"].rms == pytest.approx(np.sqrt(np.mean(chunks)), rel=1e-4)
    assert [node.name for node in weighted_products(model)] == ["n1", "n3"]


def test_smoothing_keeps_the_function_and_helps_int8() -> None:
    model, x = model_of(NORM, large=50.0), array(16, 6, 16)
    even = smooth(model, input_ranges(model, x))
    np.testing.assert_allclose(run(even, x), run(model, x), atol=1e-4)
    before, after = input_ranges(model, x)["n"], input_ranges(even, x)["n"]
    assert after.peak < before.peak / 2
    keep = float32_nodes(model)
    assert error(model, to_int8(even, keep), x) < 0.5 * error(model, to_int8(model, keep), x)
    between = (before.peak + after.peak) / 2
    assert towering(model, input_ranges(model, x), between) == {"n1"}
    assert towering(even, input_ranges(even, x), between) == set()


OTHERS_READ = """
  d = ReduceMean<keepdims = 0>(c, one)
  f = ReduceMean<keepdims = 1>(n, last)
  e = ReduceMean<keepdims = 0>(f, one)
  feature = Add(d, e)
}
"""


def test_a_norm_that_others_read_too_is_left_alone() -> None:
    model = model_of(NORM.replace("\n  feature = ReduceMean<keepdims = 0>(c, one)\n}\n", OTHERS_READ), large=50.0)
    even = smooth(model, input_ranges(model, array(4, 6, 16)))
    assert {tensor.name for tensor in even.graph.initializer} >= {"gamma", "beta", "w1"}


def test_what_the_first_cut_waits_for() -> None:
    model = model_of(CUT)
    assert [node.name for node in decisions(model)] == ["n4"], "listing the best classes decides nothing"
    assert waited_for(model, 1) == {"n0", "n1", "n2", "n3"}
    assert waited_for(model, 0) == set()


def test_a_mean_that_few_pictures_hold_down_does_not_suffice() -> None:
    """Both means are 0.9988; the second rests on one picture of 64 that lost a lot."""
    even = np.full(64, 0.9988)
    uneven = np.where(np.arange(64) == 0, 0.9988 - 63 * 0.0011, 0.9999)
    assert uneven.mean() == pytest.approx(even.mean())
    assert _suffices(even) and not _suffices(uneven)
    assert not _suffices(np.full(64, 0.9984))


@pytest.mark.parametrize("target, quantised", [(0.0, {"n1_quant", "n7_quant"}), (2.0, {"n7_quant"})])
def test_what_a_cut_waits_for_is_float32_where_int8_misses_its_target(
    monkeypatch, target: float, quantised: set
) -> None:
    monkeypatch.setattr("export.int8.TARGET", target)
    monkeypatch.setattr("export.int8.GATE", min(target, 0.998))
    model = model_of(CUT)
    low = to_int8(model, float32_nodes(model), array(16, 6, 16))
    assert {node.name for node in low.graph.node if node.op_type == "MatMulInteger"} == quantised


def test_static_scales_are_fixed_and_symmetric() -> None:
    model, x = model_of(NORM), array(16, 6, 16)
    low = convert(tidy(model), "int8-static", x)
    check_operators(low, "int8-static")
    kinds = [node.op_type for node in low.graph.node]
    assert "QuantizeLinear" in kinds and "DynamicQuantizeLinear" not in kinds
    zeros = [numpy_helper.to_array(tensor) for tensor in low.graph.initializer if "zero_point" in tensor.name]
    assert zeros and not any(value.any() for value in zeros)
    assert 0 < error(model, low, x) < 0.1 * np.abs(run(model, x)).max()


def test_static_scales_need_pictures() -> None:
    with pytest.raises(UserError, match="--calibration"):
        to_int8_static(model_of(NORM), set(), None)
