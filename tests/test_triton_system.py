"""The model repository on the real tritonserver binary: answers, batching, refusals, restart, reload under load."""

import asyncio
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from triton_server import Missing, TritonServer, packages

from export.client import Failed, KserveClient, Refused
from export.load_truth import Truth, load_truth
from export.serve_folder import ServedFolder, export_embedded, open_folder
from export.serve_models import open_run
from export.triton_config import Limits
from export.triton_repo import write_repository
from patchrank.atomic import sha256_of
from patchrank.text import tokenize

pytestmark = pytest.mark.system
http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
DENSE, HALF, ALIAS = "patchrank-keep-1", "patchrank-keep-0.6", "patchrank"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ServedFolder:
    path = tmp_path_factory.getbasetemp() / "embedded" / "onnx"
    export_embedded(path)
    return open_folder(path)


@pytest.fixture(scope="module")
def truth(folder: ServedFolder) -> Truth:
    return load_truth(folder, "digits", None, "test", 16)


@pytest.fixture(scope="module")
def out(folder: ServedFolder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton")
    flags = ["--model", str(folder.path), "--out", str(out), "--device", "cpu", "--max-batch", "16"]
    subprocess.run([sys.executable, "-m", "export.triton_repo", *flags], check=True, timeout=100)
    return out


@pytest.fixture(scope="module")
def server(out: Path):
    try:
        packages()
    except Missing as error:
        pytest.skip(f"tritonserver: {error}")
    with TritonServer(out / "models") as server:
        yield server


def clients(server: TritonServer) -> list:
    return [
        http.InferenceServerClient(f"127.0.0.1:{server.http}"),
        grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}"),
    ]


def ask(client, model: str, name: str, value: np.ndarray, outputs: list[str]) -> dict[str, np.ndarray]:
    library = http if isinstance(client, http.InferenceServerClient) else grpc
    kind = {"uint8": "UINT8", "int64": "INT64"}[value.dtype.name]
    tensor = library.InferInput(name, list(value.shape), kind)
    tensor.set_data_from_numpy(value)
    result = client.infer(model, [tensor], outputs=[library.InferRequestedOutput(output) for output in outputs])
    return {output: result.as_numpy(output) for output in outputs}


@pytest.mark.parametrize("protocol", [0, 1], ids=["http", "grpc"])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_model_gives_what_onnx_runtime_gives_here(server, folder, truth, protocol: int, batch: int) -> None:
    client = clients(server)[protocol]
    image = truth.image_BHW3[:batch]
    for model in folder.variants:
        outputs = [value["name"] for value in model.record["outputs"]]
        local = open_run(model.graph, outputs, threads=1)({"image": image})
        names = [model.name, ALIAS] if model is folder.default else [model.name]
        for name in names:
            found = ask(client, name, "image", image, outputs)
            for output in outputs:
                assert np.array_equal(found[output], local[output]), (name, output)
    token = tokenize(["a photo of the digit three"] * batch, 64).numpy()
    local = open_run(folder.text.graph, ["feature"], threads=1)({"token": token})
    assert np.array_equal(ask(client, "patchrank-text", "token", token, ["feature"])["feature"], local["feature"])


def test_best_classes_come_by_name(server, folder, truth) -> None:
    tensor = http.InferInput("image", list(truth.image_BHW3[:1].shape), "UINT8")
    tensor.set_data_from_numpy(truth.image_BHW3[:1])
    wanted = http.InferRequestedOutput("probabilities", class_count=2)
    (first, _) = clients(server)[0].infer(ALIAS, [tensor], outputs=[wanted]).as_numpy("probabilities")[0]
    assert first.decode().split(":")[2] == folder.class_names[truth.best_B[HALF][0]]


async def burst(server: TritonServer, truth: Truth, model: str, count: int) -> list:
    """`count` requests at once, half of them over each protocol: their outputs, or what was raised."""
    async with (
        KserveClient(f"127.0.0.1:{server.http}", "http", count) as one,
        KserveClient(f"127.0.0.1:{server.grpc}", "grpc") as other,
    ):
        rows = [np.array([number % len(truth.ids)]) for number in range(count)]
        pairs = zip(rows, [one, other] * count)
        calls = [client.infer(model, {"image": truth.image_BHW3[row]}, truth.outputs) for row, client in pairs]
        found = await asyncio.gather(*calls, return_exceptions=True)
    assert not [row for row, value in zip(rows, found) if isinstance(value, dict) and truth.is_wrong(model, row, value)]
    return found


def metric(server: TritonServer, name: str, model: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{") and f'model="{model}"' in line)


def test_requests_share_calls_and_the_metrics_say_so(server, truth) -> None:
    names = ("nv_inference_count", "nv_inference_exec_count", "nv_inference_request_success")
    before = [metric(server, name, HALF) for name in names]
    found = asyncio.run(burst(server, truth, HALF, 48))
    assert all(isinstance(value, dict) for value in found)
    images, calls, requests = (metric(server, name, HALF) - was for name, was in zip(names, before))
    assert (images, requests) == (48, 48)
    assert calls <= 24, "dynamic batching joins requests"
    statistics = clients(server)[0].get_inference_statistics(HALF)["model_stats"][0]
    assert max(entry["batch_size"] for entry in statistics["batch_stats"]) > 1


def post(server: TritonServer, model: str, body: bytes, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http}/v2/models/{model}/infer", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def test_malformed_requests_are_refused_and_harm_nobody(server, truth) -> None:
    good = {"name": "image", "shape": [1, 112, 112, 3], "datatype": "UINT8", "data": [0] * (112 * 112 * 3)}
    bad = [
        b"",
        b"{",
        b"[]",
        json.dumps({"inputs": []}).encode(),
        json.dumps({"inputs": [good | {"name": "picture"}]}).encode(),
        json.dumps({"inputs": [good | {"shape": [1, 112, 112]}]}).encode(),
        json.dumps({"inputs": [good | {"shape": [17, 112, 112, 3]}]}).encode(),
        json.dumps({"inputs": [good | {"datatype": "FP32"}]}).encode(),
        json.dumps({"inputs": [good | {"data": [0]}]}).encode(),
    ]
    for body in bad:
        code, message = post(server, HALF, body)
        # Triton itself says 500 to what is no JSON; what counts is that it says so, and to this caller only.
        assert code >= 400 and json.loads(message)["error"], (body[:80], code, message)
    assert 400 <= post(server, "nothing", json.dumps({"inputs": [good]}).encode())[0] < 500
    header = {"Inference-Header-Content-Length": "99999999"}
    assert 400 <= post(server, HALF, b"{}", **header)[0] < 500
    for client in clients(server):
        with pytest.raises(Exception, match="shape"):
            ask(client, HALF, "image", truth.image_BHW3[:1, :50], ["feature"])
    assert post(server, HALF, json.dumps({"inputs": [good]}).encode())[0] == 200


def test_overload_is_refused_at_once_and_the_rest_is_right(server, truth) -> None:
    client = clients(server)[0]
    config = client.get_model_config(DENSE)
    config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] = 2
    config["dynamic_batching"]["preferred_batch_size"] = []
    config["max_batch_size"] = 1
    config["model_warmup"] = []
    client.load_model(DENSE, config=json.dumps(config))
    try:
        found = asyncio.run(burst(server, truth, DENSE, 60))
    finally:
        client.unload_model(DENSE)
        client.load_model(DENSE)
    kinds = {type(value) for value in found}
    assert kinds == {dict, Refused}, [value for value in found if not isinstance(value, (dict, Refused))][:3]


def second_export(folder: ServedFolder, path: Path) -> ServedFolder:
    """The same graphs with another word inside: other files, equal answers."""
    import onnx

    shutil.copytree(folder.path, path)
    manifest = json.loads((path / "image.json").read_text())
    for record in manifest["models"]:
        graph = path / record["graph"]
        model = onnx.load(graph, load_external_data=False)
        model.doc_string = "second"
        graph.write_bytes(model.SerializeToString())
        record["files"][record["graph"]] = sha256_of(graph)
    (path / "image.json").write_text(json.dumps(manifest))
    return open_folder(path)


def test_new_versions_and_reloads_under_load_lose_nothing(server, folder, truth, out: Path, tmp_path: Path) -> None:
    other = second_export(folder, tmp_path / "second")
    names = [model.name for model in folder.variants] + [ALIAS]
    reading = dict(zip(names, [*names[:-1], folder.default.name]))

    async def callers() -> tuple[int, list]:
        done, wrong, count = asyncio.Event(), [], 0
        async with (
            KserveClient(f"127.0.0.1:{server.http}") as one,
            KserveClient(f"127.0.0.1:{server.grpc}", "grpc") as two,
        ):

            async def caller(number: int) -> None:
                nonlocal count
                while not done.is_set():
                    row, name = np.array([count % len(truth.ids)]), names[count % len(names)]
                    count += 1
                    client = (one, two)[number % 2]
                    values = await client.infer(name, {"image": truth.image_BHW3[row]}, truth.outputs)
                    if truth.is_wrong(reading[name], row, values):
                        wrong.append((name, row))

            tasks = [asyncio.create_task(caller(number)) for number in range(6)]
            await asyncio.sleep(1)
            limits = Limits(max_batch=16, device="cpu")
            manifest = await asyncio.to_thread(write_repository, other, limits, out)
            assert {model["version"] for model in manifest["models"] if "image" in str(model["inputs"])} == {2}
            for name in names:
                await one.wire.load_model(name)
            await asyncio.sleep(1)
            done.set()
            await asyncio.gather(*tasks)
        return count, wrong

    count, wrong = asyncio.run(callers())
    assert wrong == [] and count > 50
    client = clients(server)[0]
    assert client.get_model_metadata(DENSE)["versions"] == ["2"]
    assert not client.is_model_ready(DENSE, "1")


def test_a_restart_is_a_failure_then_all_is_well(server, truth) -> None:
    server.stop()
    assert {type(value) for value in asyncio.run(burst(server, truth, DENSE, 4))} == {Failed}
    server.start()
    assert all(isinstance(value, dict) for value in asyncio.run(burst(server, truth, DENSE, 8)))
