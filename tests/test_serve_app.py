"""The embedded server's routes and limits, around graphs that are plain functions."""

import asyncio
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_export import CLASSES, SIZE, write_export
from PIL import Image, PngImagePlugin

from export.serve import ServeConfig, check, is_loopback, listen
from export.serve_app import build_app
from export.serve_batcher import Admission, Batcher, Overloaded, Stopping
from export.serve_folder import open_folder
from export.serve_images import BadImage, ImageReader, TooManyPixels, crop_of
from export.serve_protocol import HEADER, BadRequest
from export.serve_service import ServerLimits, Service, TooSlow
from export.serve_text import BadClasses, prompts, tokenizer_of
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.text import tokenize

testclient = pytest.importorskip("starlette.testclient")
pytest.importorskip("prometheus_client")

LIMITS = ServerLimits(max_batch=4, max_queue=8, max_bytes=200_000, max_pixels=10_000, max_classes=5)


def image_run(inputs: dict) -> dict:
    """Class by the mean of the red channel: dark 0, grey 1, light 2."""
    image = inputs["image"]
    best = np.minimum(image[..., 0].mean((1, 2)) // 86, 2).astype(np.int64)
    order = np.stack([(best + shift) % 3 for shift in range(3)], axis=1)
    share = np.tile(np.array([0.7, 0.2, 0.1], np.float32), (len(image), 1))
    feature = np.eye(4, dtype=np.float32)[best]
    kept = np.tile(np.arange(8), (len(image), 1))
    found = {"feature": feature, "probabilities": share, "top5_probability": share}
    return found | {"top5_index": order, "kept": kept}


def dense_run(inputs: dict) -> dict:
    return {name: value for name, value in image_run(inputs).items() if name != "kept"}


def text_run(inputs: dict) -> dict:
    """A text's feature by its length."""
    token = inputs["token"]
    if token.max() > 258:
        raise BadRequest("the model refuses these values")
    return {"feature": np.eye(4, dtype=np.float32)[(token < 256).sum(1) % 4]}


RUNS = {"patchrank-keep-1": dense_run, "patchrank-keep-0.5": image_run, "patchrank-text": text_run}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(folder: Path):
    app = build_app(Service(open_folder(folder), RUNS, LIMITS), ["testserver"])
    with testclient.TestClient(app) as client:
        yield client


def png(colour=(200, 0, 0), size=(40, 30), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


def tensor(rows: int = 1, colour: int = 200) -> dict:
    data = np.full((rows, SIZE, SIZE, 3), colour, np.uint8)
    return {"name": "image", "shape": list(data.shape), "datatype": "UINT8", "data": data.ravel().tolist()}


def infer(client, model: str = "patchrank", **message):
    return client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor()]} | message)


def test_health_and_metadata(client) -> None:
    assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
    assert client.get("/v2").json()["name"] == "patchrank"
    about = client.get("/v2/models/patchrank").json()
    assert about["name"] == "patchrank"
    assert about["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, SIZE, SIZE, 3]}]
    assert client.get("/v2/models/patchrank-keep-1/versions/1/ready").json()["ready"]
    for path in ("/v2/models/nothing", "/v2/models/patchrank/versions/2", "/v2/models/nothing/ready"):
        answer = client.get(path)
        assert answer.status_code == 404 and "patchrank-keep-1" in answer.json()["error"]
    assert client.get("/v2/models/patchrank/infer").status_code == 405


def test_infer_in_json(client) -> None:
    answer = infer(client, id="7", outputs=[{"name": "top5_index"}, {"name": "kept"}])
    assert answer.status_code == 200, answer.text
    index, kept = answer.json()["outputs"]
    assert (index["data"], index["shape"], index["datatype"]) == ([2, 0, 1], [1, 3], "INT64")
    assert kept["data"] == list(range(8)) and answer.json()["id"] == "7"
    assert [output["name"] for output in infer(client, "patchrank-keep-1").json()["outputs"]][-1] == "top5_index"


def test_infer_in_bytes(client) -> None:
    image = np.full((2, SIZE, SIZE, 3), 100, np.uint8)
    spec = {"name": "image", "shape": list(image.shape), "datatype": "UINT8"}
    message = {"inputs": [spec | {"parameters": {"binary_data_size": image.nbytes}}]}
    message["outputs"] = [{"name": "feature", "parameters": {"binary_data": True}}]
    head = json.dumps(message).encode()
    sent = client.post("/v2/models/patchrank/infer", content=head + image.tobytes(), headers={HEADER: str(len(head))})
    length = int(sent.headers[HEADER])
    (output,) = json.loads(sent.content[:length])["outputs"]
    feature = np.frombuffer(sent.content[length:], np.float32).reshape(output["shape"])
    assert np.array_equal(feature, np.eye(4)[[1, 1]])


def test_what_is_malformed_is_400_and_the_server_goes_on(client) -> None:
    for content in (b"", b"{", b"[]", b'{"inputs": []}', b"\xff\xfe"):
        answer = client.post("/v2/models/patchrank/infer", content=content)
        assert answer.status_code == 400 and answer.json()["error"]
    assert infer(client, inputs=[tensor(rows=5)]).json()["error"].endswith("takes up to 4")
    tokens = {"name": "token", "shape": [1, 16], "datatype": "INT64", "data": [9999] * 16}
    assert infer(client, "patchrank-text", inputs=[tokens]).status_code == 400
    assert infer(client, "nothing").status_code == 404
    assert infer(client).status_code == 200


def test_classify_a_picture(client) -> None:
    answer = client.post("/classify", content=png()).json()
    assert [entry["name"] for entry in answer["top"]] == ["two", "zero", "one"]
    assert answer["model"] == "patchrank-keep-0.5" and answer["macs_share"] == 0.6
    assert answer["kept"] == list(range(8)) and answer["grid"] == [4, 4]
    assert answer["size"] == [40, 30] and answer["crop"] == [5.0, 0.0, 30.0, 30.0]
    dense = client.post("/classify?model=patchrank-keep-1", content=png((10, 0, 0))).json()
    assert dense["kept"] is None and dense["top"][0]["name"] == "zero"


def test_classify_with_classes_of_the_request(client) -> None:
    # Features are unit vectors by length mod 4: image 2 meets the prompt of that length.
    template = "{}"
    query = {"class": ["aaaaa", "bbbbbb"], "template": template}
    answer = client.post("/classify", params=query, content=png()).json()
    best, other = answer["top"]
    assert (best["name"], best["index"]) == ("bbbbbb", 1)
    assert best["probability"] == pytest.approx(1 / (1 + np.exp(-20.0)))
    assert best["probability"] + other["probability"] == pytest.approx(1)
    again = client.post("/classify", params=query, content=png()).json()
    assert again["top"] == answer["top"]


@pytest.mark.parametrize(
    "query, words",
    [
        ("class=a", "give 2 to 5"),
        ("&".join(f"class={n}" for n in range(6)), "give 2 to 5"),
        ("class=a&class=a", "twice"),
        ("class=a&class=%20", "1 to 200"),
        ("class=a&class=b&template=none", "must hold {} once"),
        ("model=nothing", "choose one of"),
        ("model=patchrank-text", "choose one of"),
        ("kees=1", "unknown; /classify takes class, model, template"),
    ],
)
def test_bad_questions(client, query: str, words: str) -> None:
    answer = client.post(f"/classify?{query}", content=png())
    assert answer.status_code == 400 and words in answer.json()["error"]


def test_bytes_that_are_no_picture(client) -> None:
    for content in (b"", b"hello", png()[:60], b"%PDF-1.4", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        answer = client.post("/classify", content=content)
        assert answer.status_code == 400 and "picture" in answer.json()["error"]


def test_limits_of_bytes_and_pixels(client) -> None:
    answer = client.post("/classify", content=bytes(200_001))
    assert answer.status_code == 413 and answer.headers["connection"] == "close"
    chunked = client.post("/classify", content=(bytes(50_000) for _ in range(5)))
    assert chunked.status_code == 413
    assert client.post("/classify", content=png(size=(101, 100))).status_code == 413
    assert client.post("/classify", content=png(size=(100, 100))).status_code == 200


def test_a_body_that_does_not_arrive_is_408_and_frees_its_bytes(folder: Path) -> None:
    class Slow:
        headers: dict[str, str] = {}

        async def stream(self):
            yield b"12345"
            await asyncio.sleep(60)

    service = Service(open_folder(folder), RUNS, ServerLimits(read_timeout_s=0.05))
    with pytest.raises(TooSlow):
        asyncio.run(service.body(Slow()))
    assert service.bytes.rows == 0


def test_a_mistake_of_ours_is_500_without_its_details(folder: Path) -> None:
    def broken(inputs: dict) -> dict:
        raise RuntimeError("secret path")

    app = build_app(Service(open_folder(folder), RUNS | {"patchrank-keep-0.5": broken}, LIMITS), ["testserver"])
    with testclient.TestClient(app) as client:
        answer = infer(client)
        assert answer.status_code == 500 and "secret" not in answer.text
        assert infer(client, "patchrank-keep-1").status_code == 200
        assert 'code="500"' in client.get("/metrics").text


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    preprocess = Preprocess(image_size=(SIZE, SIZE), resize=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    reader = ImageReader(preprocess, max_pixels=10_000)
    header = bytearray(png())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    start = time.perf_counter()
    with pytest.raises(TooManyPixels):
        reader(bytes(header))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 30_000_000, zip=True)
    with pytest.raises(BadImage):
        reader(png(pnginfo=text))
    assert time.perf_counter() - start < 5
    with pytest.raises(BadImage, match="too long"):
        reader(png(size=(1, 150)))


def test_pictures_of_every_kind_become_the_models_input() -> None:
    preprocess = Preprocess(image_size=(4, 4), resize=4, mean=(0.5,) * 3, std=(0.2,) * 3)
    reader = ImageReader(preprocess, max_pixels=1000)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8))
    for kind in ("PNG", "BMP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        decoded = reader(buffer.getvalue())
        values = (preprocess(picture).numpy() * 0.2 + 0.5) * 255
        assert np.abs(decoded.image_HW3.transpose(2, 0, 1) - values).max() < 1e-3
    for mode in ("L", "RGBA", "P", "1", "LA", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (5, 5)).save(buffer, "PNG")
        assert reader(buffer.getvalue()).image_HW3.shape == (4, 4, 3)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(turned, "PNG", exif=exif)
    assert reader(turned.getvalue()).size == (7, 9)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (33, 33)])
@pytest.mark.parametrize("resize", [40, (40, 36)])
def test_the_crop_is_where_the_model_looks(mode: str, size: tuple[int, int], resize) -> None:
    """Pictures whose red is the column and green the row: the input's own values say where each pixel was."""
    preprocess = Preprocess(image_size=(32, 32), resize=resize, mode=mode, mean=(0.0,) * 3, std=(1.0,) * 3)
    column, row = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = Image.fromarray(np.stack([2 * column, 2 * row, 0 * row], -1).astype(np.uint8))
    left, top, width, height = crop_of(size, preprocess)
    seen_3HW = preprocess(picture).numpy() * 255 / 2
    middle = slice(8, 24)
    columns = left + (np.arange(32) + 0.5) * width / 32 - 0.5
    rows = top + (np.arange(32) + 0.5) * height / 32 - 0.5
    assert np.abs(seen_3HW[0][16, middle] - columns[middle]).max() < 1.2
    assert np.abs(seen_3HW[1][middle, 16] - rows[middle]).max() < 1.2


def test_metrics_count_by_served_name_only(client) -> None:
    infer(client, "patchrank")
    infer(client, "nothing-of-ours")
    page = client.get("/metrics").text
    assert 'patchrank_requests_total{code="200",model="patchrank-keep-0.5"}' in page
    assert 'patchrank_batch_images_count{model="patchrank-keep-0.5"}' in page
    assert "nothing-of-ours" not in page and 'code="404",model=""' in page


def test_the_page_and_its_example(client) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "script-src" not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css", "icon.svg"):
        assert f"/pages/{name}" in page.text and client.get(f"/pages/{name}").status_code == 200
    assert client.get("/pages/../serve.py").status_code == 404
    info = client.get("/info").json()
    assert info["class_names"] == list(CLASSES) and info["own_classes"] and info["grid"] == [4, 4]
    assert Image.open(io.BytesIO(client.get("/example?number=3").content)).size == (112, 112)
    assert client.get("/example?number=99999").status_code == client.get("/example?number=x").status_code == 400


def test_other_host_names_are_not_answered(client) -> None:
    assert client.get("/v2", headers={"host": "evil.example"}).status_code == 400


def test_a_model_without_classes_or_text(tmp_path: Path) -> None:
    folder = open_folder(write_export(tmp_path, text=False, classes=False))
    with testclient.TestClient(build_app(Service(folder, RUNS, LIMITS), ["testserver"])) as client:
        assert "no class list" in client.post("/classify", content=png()).json()["error"]
        assert "no text tower" in client.post("/classify?class=a&class=b", content=png()).json()["error"]
        assert client.get("/info").json()["own_classes"] is False


def test_overload_is_429_and_stop_answers_what_is_inside(folder: Path) -> None:
    gate = threading.Event()

    def slow(inputs: dict) -> dict:
        gate.wait(20)
        return image_run(inputs)

    service = Service(open_folder(folder), RUNS | {"patchrank-keep-0.5": slow}, LIMITS)
    with testclient.TestClient(build_app(service, ["testserver"])) as client, ThreadPoolExecutor(9) as callers:
        inside = [callers.submit(client.post, "/classify", content=png()) for _ in range(8)]
        while service.admission.rows < 8:
            time.sleep(0.005)
        refused = client.post("/classify", content=png())
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert infer(client).status_code == 429
        assert client.get("/v2/health/ready").status_code == 200
        stopping = client.portal.start_task_soon(service.stop)
        while not service.admission.closed:
            time.sleep(0.005)
        assert infer(client).status_code == 503 and client.get("/v2/health/ready").status_code == 503
        gate.set()
        assert {future.result(20).status_code for future in inside} == {200}
        stopping.result(20)
    assert service.admission.rows == 0 and service.bytes.rows == 0


def with_batcher(run, use, *, max_batch: int = 4, max_delay_s: float = 0.05):
    """Run `use(batcher)` in a loop of its own."""

    async def inside():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(run, max_batch, max_delay_s, executor, asyncio.Semaphore(1))
            batcher.start()
            try:
                return await asyncio.wait_for(use(batcher), 20)
            finally:
                await batcher.stop()

    return asyncio.run(inside())


def test_requests_share_calls_and_get_their_own_rows() -> None:
    sizes = []

    def double(inputs: dict) -> dict:
        sizes.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"]}

    async def use(batcher: Batcher):
        parts = [np.full((rows, 2), number) for number, rows in enumerate((1, 2, 3, 1, 1))]
        answers = await asyncio.gather(*(batcher({"x": part}) for part in parts))
        for part, found in zip(parts, answers):
            assert np.array_equal(found["y"], 2 * part)

    with_batcher(double, use)
    assert sizes == [3, 4, 1], "never above max_batch, in the order of arrival"


def test_a_lone_request_waits_no_longer_than_the_delay() -> None:
    async def use(batcher: Batcher) -> float:
        start = time.perf_counter()
        await batcher({"x": np.zeros((1, 1))})
        return time.perf_counter() - start

    assert 0.04 < with_batcher(lambda inputs: inputs, use) < 2.0


def test_one_bad_request_fails_alone() -> None:
    def picky(inputs: dict) -> dict:
        if (inputs["x"] < 0).any():
            raise BadRequest("negative")
        return {"y": inputs["x"]}

    async def use(batcher: Batcher):
        parts = [np.full((1, 1), value) for value in (1, -1, 2)]
        return await asyncio.gather(*(batcher({"x": part}) for part in parts), return_exceptions=True)

    first, second, third = with_batcher(picky, use)
    assert first["y"] == 1 and third["y"] == 2 and isinstance(second, BadRequest)


def test_a_caller_that_left_is_not_computed() -> None:
    seen = []

    async def use(batcher: Batcher):
        left = asyncio.create_task(batcher({"x": np.full((1, 1), 5)}))
        await asyncio.sleep(0)
        left.cancel()
        return await batcher({"x": np.zeros((1, 1))})

    with_batcher(lambda inputs: (seen.append(inputs["x"].max()), inputs)[1], use)
    assert seen == [0]


def test_admission_counts() -> None:
    admission = Admission(3)
    admission.enter(2)
    with pytest.raises(Overloaded):
        admission.enter(2)
    admission.leave(2)
    admission.enter(3)
    admission.closed = True
    with pytest.raises(Stopping):
        admission.enter(0)


def test_prompts_and_tokenizers() -> None:
    assert prompts(["a{}", "b"], "the {}!", 5) == ["the a{}!", "the b!"]
    with pytest.raises(BadClasses):
        prompts(["a", "b"], "{} {}", 5)
    note = {"kind": "utf-8 bytes", "context": 8}
    assert np.array_equal(tokenizer_of(note)(["hé"]), tokenize(["hé"], 8).numpy())
    with pytest.raises(UserError, match="transformers"):
        tokenizer_of({"kind": "transformers", "name": "x"})


@pytest.mark.parametrize(
    "changes",
    [{"threads": 0}, {"max_classes": 1}, {"max_queue": 3}, {"max_delay": -1.0}, {"port": 70_000}, {"drain": 0}],
)
def test_bad_flags(changes: dict) -> None:
    with pytest.raises(UserError, match="--"):
        check(ServeConfig(**changes))


def test_addresses() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(UserError, match="--port 0 takes a free one"):
            listen("127.0.0.1", bound.getsockname()[1])
