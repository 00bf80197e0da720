"""Passes over graphs, float16 typing and the shared weights file, on graphs written by hand: nothing is traced."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.half import to_float16
from export.operators import check_operators
from export.precision import convert, residual_nodes, selection_nodes
from export.runtimes import open_session
from export.tidy import strip, tidy
from export.weights_file import WeightsFile
from patchrank.errors import UserError

GENERATOR = np.random.default_rng(0)


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    """A graph in ONNX's own text form, with initialisers; nodes are named n0, n1, ..."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 18]>\n' + text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    session = open_session(model.SerializeToString())
    return session.run(None, inputs)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def array(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


PRUNE = """
g (float[batch, 6, 4] x, float[batch, 6] score) => (float[batch, 3, 4] kept)
{
  values, order = TopK<axis = 1>(score, k)
  first = Slice(order, zero, three, one, one)
  column = Unsqueeze(first, last)
  index = Expand(column, shape)
  kept = GatherElements<axis = 1>(x, index)
}
"""


def prune() -> onnx.ModelProto:
    return model_of(PRUNE, k=ints(6), zero=ints(0), three=ints(3), one=ints(1), last=ints(-1), shape=ints(1, 1, 4))


def test_gather_of_rows_and_narrow_top_k_keep_the_values() -> None:
    x, score = array(3, 6, 4), array(3, 6)
    before = run(prune(), x=x, score=score)
    model = tidy(prune())
    assert kinds(model) == ["TopK", "Unsqueeze", "GatherND"]
    assert np.array_equal(run(model, x=x, score=score)[0], before[0])
    order = np.argsort(-score, axis=1)[:, :3]
    assert np.array_equal(before[0], np.take_along_axis(x, order[..., None], 1))


def test_top_k_of_which_the_rest_is_read_too_stays_wide() -> None:
    model = model_of(
        """
        g (float[batch, 6] score) => (int64[batch, 3] first, int64[batch, 3] rest)
        {
          values, order = TopK<axis = 1>(score, k)
          first = Slice(order, zero, three, one, one)
          rest = Slice(order, three, six, one, one)
        }
        """,
        k=ints(6), zero=ints(0), three=ints(3), one=ints(1), six=ints(6),
    )  # fmt: skip
    score = array(2, 6)
    before = run(model, score=score)
    after = run(tidy(model), score=score)
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_idle_broadcast_goes_and_a_needed_one_stays() -> None:
    model = model_of(
        """
        g (float[batch, 3, 4] x, float[batch, 3, 1] y) => (float[batch, 3, 4] z, float[batch, 3, 4] w)
        {
          wide = Expand(y, shape)
          z = Div(x, wide)
          w = Div(y, wide)
        }
        """,
        shape=ints(1, 1, 4),
    )
    x, y = array(2, 3, 4), array(2, 3, 1)
    before = run(model, x=x, y=y)
    model = tidy(model)
    assert kinds(model).count("Expand") == 1
    assert all(np.array_equal(a, b) for a, b in zip(before, run(model, x=x, y=y)))


def test_keys_are_transposed_without_reshapes() -> None:
    model = model_of(
        """
        g (float[batch, 2, 5, 3] k) => (float[a, b, c, d] t)
        {
          s = Shape(k)
          length = Slice(s, two, three, zero, one)
          width = Slice(s, three, four, zero, one)
          outer = Slice(s, zero, two, zero, one)
          flat_shape = Concat<axis = 0>(minus, length, width)
          flat = Reshape(k, flat_shape)
          swapped = Transpose<perm = [0, 2, 1]>(flat)
          full_shape = Concat<axis = 0>(outer, width, length)
          t = Reshape(swapped, full_shape)
        }
        """,
        zero=ints(0), one=ints(1), two=ints(2), three=ints(3), four=ints(4), minus=ints(-1),
    )  # fmt: skip
    k = array(3, 2, 5, 3)
    model = tidy(model)
    assert kinds(model) == ["Transpose"]
    assert np.array_equal(run(model, k=k)[0], k.transpose(0, 1, 3, 2))


GELU = """
g (float[batch, 5] x) => (float[batch, 5] y)
{
  scaled = Div(x, root)
  e = Erf(scaled)
  shifted = Add(e, one)
  halved = Mul(half, shifted)
  y = Mul(x, halved)
}
"""


def test_gelu_gets_the_form_that_runtimes_fuse_bit_by_bit() -> None:
    root, one, half = (np.float32(value).reshape(()) for value in (2**0.5, 1.0, 0.5))
    x = 3 * array(7, 5)
    plain, model = (model_of(GELU, root=root, one=one, half=half) for _ in range(2))
    model = tidy(model)
    before, after = (ReferenceEvaluator(form).run(None, {"x": x})[0] for form in (plain, model))
    assert np.array_equal(after, before)
    np.testing.assert_allclose(run(model, x=x)[0], before, atol=1e-6)
    product, last = model.graph.node[-2:]
    assert (list(product.input), list(last.input)) == (["x", "shifted"], ["halved", "half"])
    other = tidy(model_of(GELU, root=root, one=one, half=np.float32(0.3).reshape(())))
    assert list(other.graph.node[-1].input) == ["x", "halved"], "only halving is exact"


def test_slices_and_transposes_of_weights_are_stored() -> None:
    model = model_of(
        """
        g (float[batch, 4] x) => (float[batch, 2] y)
        {
          rows = Slice(w, one, three, zero, one)
          columns = Transpose<perm = [1, 0]>(rows)
          y = MatMul(x, columns)
        }
        """,
        w=array(6, 4), zero=ints(0), one=ints(1), three=ints(3),
    )  # fmt: skip
    x = array(3, 4)
    before = run(model, x=x)
    model = tidy(model)
    assert kinds(model) == ["MatMul"]
    assert [tensor.name for tensor in model.graph.initializer] == ["columns"]
    assert np.array_equal(run(model, x=x)[0], before[0])


def test_unread_nodes_and_local_paths_are_removed() -> None:
    model = prune()
    model.graph.node.append(helper.make_node("Neg", ["x"], ["unread"], name="spare"))
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "stack_trace", "/home/someone/model.py"
    model = tidy(model)
    strip(model)
    assert "Neg" not in kinds(model)
    assert b"/home/" not in model.SerializeToString()


DECIDE = """
g (float[batch, 6, 4] x) => (float[batch, 3, 5] y, int64[batch, 3] order)
{
  logits = MatMul(x, w_score)
  score = Squeeze(logits, last)
  values, order = TopK<axis = 1>(score, k)
  column = Unsqueeze(order, last)
  kept = GatherND<batch_dims = 1>(x, column)
  y = MatMul(kept, w)
}
"""


def decide() -> onnx.ModelProto:
    return model_of(DECIDE, w_score=array(4, 1), w=array(4, 5), last=ints(-1), k=ints(3))


def test_what_decides_is_found_from_the_graph() -> None:
    assert selection_nodes(decide()) == {"n0", "n1", "n2"}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_decides_stays_float32(precision: str) -> None:
    model, x = decide(), array(3, 6, 4)
    y, order = run(model, x=x)
    converted = convert(model, precision)
    y_low, order_low = run(converted, x=x)
    assert np.array_equal(order_low, order), "the scores must not have moved"
    assert 0 < np.abs(y_low - y).max() < 0.1
    types = {tensor.name: tensor.data_type for tensor in converted.graph.initializer}
    assert types["w_score"] == TensorProto.FLOAT
    assert "w" not in types


BLOCK = """
g (float[batch, 6, 4] x) => (float[batch, 6, 4] y)
{
  early = MatMul(x, w)
  normed = LayerNormalization(early, one)
  up = MatMul(normed, w)
  biased = Add(up, one)
  down = MatMul(biased, w)
  stream = Add(early, down)
  normed_again = LayerNormalization(stream, one)
  y = MatMul(normed_again, w)
}
"""


def test_the_residual_stream_stays_float32_in_float16() -> None:
    """In the graph above: both norms and the sum between them, none of the products."""
    model = model_of(BLOCK, w=array(4, 4), one=np.ones(4, np.float32))
    assert residual_nodes(model) == {"n1", "n5", "n6"}
    types = {tensor.name: tensor.data_type for tensor in convert(model, "float16").graph.initializer}
    assert types == {"one": TensorProto.FLOAT, "one_half": TensorProto.FLOAT16, "w_half": TensorProto.FLOAT16}


def test_a_large_stream_keeps_what_a_block_adds() -> None:
    """2048 + 1/4 is 2048 in float16. ONNX Runtime on a CPU leaves such roundings out, the reference does not."""
    model = model_of(
        BLOCK.replace("stream = Add(early, down)", "stream = Add(offset, down)"),
        w=np.eye(4, dtype=np.float32),
        one=np.ones(4, np.float32),
        offset=np.full(4, 2048, np.float32),
    )
    x = array(3, 6, 4)
    (full,), (kept,), (rounded,) = (
        ReferenceEvaluator(form).run(None, {"x": x})
        for form in (model, convert(model, "float16"), to_float16(model, set()))
    )
    assert np.abs(kept - full).max() < 0.01 < np.abs(rounded - full).max()


def test_float16_graph_has_one_cast_per_meeting_and_its_own_outputs() -> None:
    model = model_of(
        "g (float[batch, 4] x) => (float[batch, 4] y, float[batch, 4] z)\n{\n y = Mul(x, w)\n z = Add(y, x)\n}",
        w=array(4),
    )
    x = array(2, 4)
    half = to_float16(model, set())
    assert kinds(half).count("Cast") == 3, "x once, each output once"
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in half.graph.output)
    for a, b in zip(run(model, x=x), run(half, x=x)):
        np.testing.assert_allclose(a, b, atol=5e-3)


def test_weight_outside_float16_is_refused_by_name() -> None:
    model = model_of("g (float[batch, 1] x) => (float[batch, 1] y)\n{\n y = Mul(x, huge)\n}", huge=np.float32([1e6]))
    with pytest.raises(UserError, match="huge"):
        to_float16(model, set())


@pytest.mark.parametrize("op_type", ["ScatterElements", "If", "Loop", "NonZero", "Scan"])
def test_positive_list_names_the_stray_node(op_type: str) -> None:
    graph = helper.make_graph([helper.make_node(op_type, ["x"], ["y"], name="stray")], "g", [], [])
    with pytest.raises(UserError, match=f"{op_type} .stray."):
        check_operators(helper.make_model(graph))


def test_idle_sessions_leave_the_cores_to_others() -> None:
    session = open_session(decide().SerializeToString())
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_equal_weights_are_stored_once_and_read_back(tmp_path: Path) -> None:
    text = "g (float[batch, 32] x) => (float[batch, 32] y)\n{\n h = MatMul(x, w)\n y = Add(h, b)\n}"
    w, x = array(32, 32), array(2, 32)
    models = [model_of(text, w=w, b=array(32)) for _ in range(2)]
    expected = [run(model, x=x)[0] for model in models]
    file = WeightsFile(tmp_path, "shared")
    for number, model in enumerate(models):
        file.add(model, f"{number}.onnx")
    weights, *graphs = file.finish()
    assert weights.stat().st_size == w.nbytes
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (weights, *graphs))
    for graph, value in zip(graphs, expected):
        session = open_session(graph)
        assert np.array_equal(session.run(None, {"x": x})[0], value)
