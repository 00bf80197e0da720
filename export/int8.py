"""float32 graph -> int8 graph: weights in int8 by channel, activations quantised as they come or by fixed scales.

Dynamic quantisation is the CPU runtimes' fast path. Static quantisation writes its scales into the graph as
QuantizeLinear / DequantizeLinear pairs, the one form that TensorRT and OpenVINO read as int8.

With calibration pictures both spend int8 where it does no harm: LayerNorms are smoothed, products with towering inputs
stay float32, and so does what the first cuts wait for, until the feature is right: a cut that compares rounded tokens
keeps other patches.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx

from export.ranges import PRODUCTS, input_ranges, weighted_products
from export.runtimes import BATCHES, open_session
from export.smooth import smooth, towering
from patchrank.errors import UserError

TARGET, GATE = 0.9985, 0.998
"""Mean cosine to the float32 graph on the calibration pictures, and what the gate asks for on others: two standard
errors of the mean must lie between, for with several cuts a few pictures lose much and few pictures show it."""
PEAK_DYNAMIC, PEAK_STATIC = 50.0, 10.0
"""Peaks that still fit an 8-bit scale: of one call's tensor, and of all calibration pictures together, with half of a
symmetric scale unused behind GELU. Chosen on Tiny-ImageNet train images."""
_CHUNK = 8


def to_int8(model: onnx.ModelProto, keep_float32: set[str], calibration: np.ndarray | None = None) -> onnx.ModelProto:
    """Weights in int8 by channel, activations quantised as they come; attention products stay float32.

    Args: calibration, inputs (B, ...) of the graph; without it every weighted product is quantised.
    Source: ONNX Runtime's dynamic quantisation.
    """
    if calibration is None:
        return _dynamic(model, keep_float32)
    return _careful(model, keep_float32, calibration, _dynamic, PEAK_DYNAMIC)


def to_int8_static(model: onnx.ModelProto, keep_float32: set[str], calibration: np.ndarray | None) -> onnx.ModelProto:
    """The same products between QuantizeLinear and DequantizeLinear with fixed scales, symmetric as TensorRT asks.

    Args: calibration, inputs (B, ...) of the graph; the largest value that each activation takes on them is its range.
    Raises: UserError without calibration inputs.
    Source: ONNX Runtime's static quantisation.
    """
    if calibration is None or not len(calibration):
        raise UserError("--precision int8-static: needs inputs to find its scales with; give --calibration 16 or more")
    return _careful(model, keep_float32, calibration, lambda *given: _static(*given, calibration), PEAK_STATIC)


def _careful(
    model: onnx.ModelProto,
    keep_float32: set[str],
    calibration: np.ndarray,
    quantise: Callable[[onnx.ModelProto, set[str]], onnx.ModelProto],
    peak: float,
) -> onnx.ModelProto:
    """The graph with the fewest float32 cuts that reaches TARGET, or with all of them in float32."""
    even = smooth(model, input_ranges(model, calibration))
    keep_float32 = keep_float32 | towering(even, input_ranges(even, calibration), peak)
    (expected,) = _features(model, calibration, BATCHES[-1:])
    num_cuts = sum(node.op_type == "TopK" for node in decisions(model))
    for level in range(num_cuts + 1):
        quantised = quantise(even, keep_float32 | waited_for(even, level))
        # A call's tensors share their scales, so what int8 does to a picture depends on its company: the worst counts.
        if _suffices(
            np.min([_cosine(expected, found) for found in _features(quantised, calibration, BATCHES)], axis=0)
        ):
            break
    return quantised


def _suffices(cosine_B: np.ndarray) -> bool:
    error = cosine_B.std(ddof=1) / len(cosine_B) ** 0.5 if len(cosine_B) > 1 else 0.0
    return cosine_B.mean() >= TARGET and cosine_B.mean() - 2 * error >= GATE


def decisions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The TopK nodes that choose patches, in the order of the cuts; not the one that lists the best classes."""
    read = {name for node in model.graph.node for name in node.input}
    return [node for node in model.graph.node if node.op_type == "TopK" and node.output[1] in read]


def waited_for(model: onnx.ModelProto, num_cuts: int) -> set[str]:
    """Names of all nodes that the first `num_cuts` choices of patches depend on."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    waiting = [name for node in decisions(model)[:num_cuts] for name in node.input]
    found: set[str] = set()
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += node.input
    return found


def _cosine(expected_BD: np.ndarray, found_BD: np.ndarray) -> np.ndarray:
    lengths_B = np.linalg.norm(expected_BD, axis=-1) * np.linalg.norm(found_BD, axis=-1)
    return (expected_BD * found_BD).sum(-1) / lengths_B


def _features(model: onnx.ModelProto, calibration: np.ndarray, batches: tuple[int, ...]) -> list[np.ndarray]:
    """The graph's first output (B, D), float64, once for every batch size."""
    session = open_session(model.SerializeToString())
    feed, output = model.graph.input[0].name, model.graph.output[0].name
    found = []
    for batch in batches:
        starts = range(0, len(calibration), batch)
        parts = [session.run([output], {feed: calibration[start : start + batch]})[0] for start in starts]
        found.append(np.concatenate(parts).astype(np.float64))
    return found


def _dynamic(model: onnx.ModelProto, keep_float32: set[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            _unshaped(model),
            path,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_exclude=sorted(keep_float32),
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)


def _static(model: onnx.ModelProto, keep_float32: set[str], calibration: np.ndarray) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            _unshaped(model),
            path,
            _reader(model.graph.input[0].name, calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_quantize=[node.name for node in weighted_products(model) if node.name not in keep_float32],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        return onnx.load(path)


def _reader(name: str, calibration: np.ndarray):
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """Hands the inputs over a few at a time."""

        def __init__(self) -> None:
            starts = range(0, len(calibration), _CHUNK)
            self.feeds = iter([{name: calibration[start : start + _CHUNK]} for start in starts])

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    return Reader()


def _unshaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the shapes that PyTorch's exporter writes down: the quantiser refuses them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    return copy


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The quantiser advises a preparation that our graphs do not need."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(former)
