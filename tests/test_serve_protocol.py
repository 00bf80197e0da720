"""serve_protocol.py: KServe V2 requests to arrays and back; whatever a stranger sends is an array or a BadRequest."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.serve_protocol import BadRequest, Request, TensorSpec, answer, parse

IMAGE = TensorSpec(name="image", dtype="uint8", shape=("batch", 2, 2, 3))
SCORE = TensorSpec(name="score", dtype="float32", shape=("batch", 2))
OUTPUTS = [TensorSpec(name="feature", dtype="float32", shape=("batch", 4)), SCORE]
SIZE = 2 * 2 * 3


def body(**changes) -> bytes:
    tensor = {"name": "image", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": list(range(SIZE))}
    return json.dumps({"inputs": [tensor | changes]}).encode()


def binary(size: int = SIZE, tail: bytes = bytes(range(SIZE)), **changes) -> tuple[bytes, str]:
    tensor = {"name": "image", "shape": [1, 2, 2, 3], "datatype": "UINT8", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor | changes]}).encode()
    return head + tail, str(len(head))


def test_numbers_flat_or_nested_and_raw_bytes_mean_the_same() -> None:
    wanted = np.arange(SIZE, dtype=np.uint8).reshape(1, 2, 2, 3)
    nested = body(data=wanted.tolist())
    for request in (parse(body(), None, [IMAGE], OUTPUTS), parse(nested, None, [IMAGE], OUTPUTS)):
        assert np.array_equal(request.inputs["image"], wanted) and request.inputs["image"].dtype == np.uint8
    raw, length = binary()
    assert np.array_equal(parse(raw, length, [IMAGE], OUTPUTS).inputs["image"], wanted)


def test_outputs_are_all_or_those_named_as_json_or_bytes() -> None:
    assert parse(body(), None, [IMAGE], OUTPUTS).outputs == {"feature": False, "score": False}
    message = json.loads(body()) | {"id": "7", "parameters": {"binary_data_output": True}}
    assert parse(json.dumps(message).encode(), None, [IMAGE], OUTPUTS).outputs == {"feature": True, "score": True}
    message["outputs"] = [{"name": "score", "parameters": {"binary_data": False}}]
    request = parse(json.dumps(message).encode(), None, [IMAGE], OUTPUTS)
    assert request.outputs == {"score": False} and request.id == "7"


BAD = {
    "not json": (b"{", None, "not JSON"),
    "deep": (b"[" * 100_000, None, "not JSON"),
    "not an object": (b"[]", None, "JSON object"),
    "no inputs": (b"{}", None, "list of tensors"),
    "unknown input": (body(name="picture"), None, "this model takes image"),
    "no input": (json.dumps({"inputs": []}).encode(), None, "is missing"),
    "unhashable name": (body(name=["image"]), None, "unknown"),
    "type": (body(datatype="FP32"), None, "takes UINT8"),
    "shape": (body(shape=[1, 2, 3, 2]), None, "takes [-1, 2, 2, 3]"),
    "no rows": (body(shape=[0, 2, 2, 3], data=[]), None, "1 or more"),
    "negative": (body(shape=[-1, 2, 2, 3]), None, "1 or more"),
    "huge shape": (body(shape=[10**30, 2, 2, 3]), None, "data must be"),
    "bool shape": (body(shape=[True, 2, 2, 3]), None, "whole numbers"),
    "too few": (body(data=[1, 2]), None, "data must be 12"),
    "fractions": (body(data=[0.5] * SIZE), None, "whole numbers"),
    "out of range": (body(data=[256] * SIZE), None, "range of UINT8"),
    "far out of range": (body(data=[10**30] * SIZE), None, "whole numbers"),
    "words": (body(data=["a"] * SIZE), None, "whole numbers"),
    "ragged": (body(data=[[1], [2, 3]]), None, "ragged"),
    "nested otherwise": (body(data=np.zeros((3, 2, 2), int).tolist()), None, "nested as"),
    "header": (*(binary()[0], "x"), "must be a number"),
    "header sign": (*(binary()[0], "-5"), "must be a number"),
    "header beyond": (*(binary()[0], "999999"), "must be a number"),
    "too many bytes": (*binary(tail=bytes(SIZE + 1)), "13 bytes follow"),
    "too few bytes": (*binary(tail=bytes(SIZE - 1)), "takes 12"),
    "size against shape": (*binary(size=3), "takes 12"),
    "negative size": (*binary(size=-1), "number of bytes"),
    "data twice": (*binary(data=[1]), "give one"),
    "shared memory": (body(parameters={"shared_memory_region": "x"}), None, "does not offer"),
    "parameters": (body(parameters=[]), None, "must be an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str) -> None:
    content, header, words = BAD[name]
    with pytest.raises(BadRequest) as refused:
        parse(content, header, [IMAGE], OUTPUTS)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_twice_and_unequal_batches_are_refused() -> None:
    tensor = json.loads(body())["inputs"][0]
    score = {"name": "score", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}
    with pytest.raises(BadRequest, match="twice"):
        parse(json.dumps({"inputs": [tensor, tensor]}).encode(), None, [IMAGE], OUTPUTS)
    with pytest.raises(BadRequest, match="differ in their first axis"):
        parse(json.dumps({"inputs": [tensor, score]}).encode(), None, [IMAGE, SCORE], OUTPUTS)
    for outputs in ([], [{"name": "nothing"}], ["score"], "score"):
        with pytest.raises(BadRequest):
            parse(json.dumps({"inputs": [tensor], "outputs": outputs}).encode(), None, [IMAGE], OUTPUTS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
tensor_like = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("image") | json_values,
        "shape": st.just([1, 2, 2, 3]) | json_values,
        "datatype": st.just("UINT8") | json_values,
        "data": st.lists(st.integers(-1, 256), min_size=SIZE, max_size=SIZE) | json_values,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": json_values}) | json_values,
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(tensor_like, max_size=2), json_values, st.none() | st.text(max_size=4), st.binary(max_size=14))
def test_nothing_else_than_a_bad_request_is_raised(inputs, outputs, header, tail) -> None:
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    for content, said in ((head, header), (head + tail, str(len(head))), (tail, None)):
        try:
            request = parse(content, said, [IMAGE], OUTPUTS)
        except BadRequest:
            continue
        assert request.inputs["image"].shape[1:] == (2, 2, 3)


@settings(max_examples=20, deadline=None)
@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)), st.booleans())
def test_an_answer_reads_back_bit_by_bit(value: np.ndarray, as_bytes: bool) -> None:
    kept = np.arange(6, dtype=np.int64).reshape(3, 2)
    request = Request(id="x", inputs={"image": kept}, outputs={"feature": as_bytes, "kept": False})
    content, length = answer("name", "1", request, {"feature": value, "kept": kept})
    assert (length is None) == (not as_bytes)
    message = json.loads(content[:length])
    feature, positions = message["outputs"]
    assert (message["model_name"], message["id"], positions["data"]) == ("name", "x", [0, 1, 2, 3, 4, 5])
    if as_bytes:
        assert feature["parameters"]["binary_data_size"] == len(content) - length == value.nbytes
        again = np.frombuffer(content[length:], np.float32)
    else:
        again = np.array(feature["data"], np.float32)
    assert np.array_equal(again.reshape(feature["shape"]), value)


def test_a_model_that_gives_no_number_is_not_passed_on() -> None:
    request = Request(id=None, inputs={"image": np.zeros((1, 1))}, outputs={"feature": False})
    with pytest.raises(ValueError):
        answer("name", "1", request, {"feature": np.array([[math.nan]], np.float32)})
