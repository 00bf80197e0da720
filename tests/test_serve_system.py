"""`python -m export.serve` and `export.load` as processes: answers, overload, SIGTERM, and the page in Chromium."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.client import Failed, KserveClient, Refused
from export.load_server import own_server
from export.load_truth import Truth, load_truth
from export.serve_folder import ServedFolder, export_embedded, open_folder
from export.serve_models import open_run

pytestmark = pytest.mark.system
for name in ("starlette", "uvicorn", "prometheus_client", "tritonclient.http"):
    pytest.importorskip(name)
ALIAS = "patchrank"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ServedFolder:
    path = tmp_path_factory.getbasetemp() / "embedded" / "onnx"
    export_embedded(path)
    return open_folder(path)


@pytest.fixture(scope="module")
def truth(folder: ServedFolder) -> Truth:
    return load_truth(folder, "digits", None, "test", 16)


@pytest.fixture(scope="module")
def url(folder: ServedFolder, tmp_path_factory) -> Iterator[str]:
    with own_server(folder.path, tmp_path_factory.mktemp("log") / "log.txt") as url:
        yield url


async def burst(url: str, truth: Truth, count: int, model: str = ALIAS) -> list:
    """`count` requests at once: their outputs, or what was raised."""
    name = "patchrank-keep-0.6" if model == ALIAS else model
    async with KserveClient(url, "http", count) as client:
        rows = [np.array([number % len(truth.ids)]) for number in range(count)]
        calls = [client.infer(model, {"image": truth.image_BHW3[row]}, truth.outputs) for row in rows]
        found = await asyncio.gather(*calls, return_exceptions=True)
    assert not [row for row, value in zip(rows, found) if isinstance(value, dict) and truth.is_wrong(name, row, value)]
    return found


def test_tritonclient_gets_what_onnx_runtime_gives_here(url: str, folder: ServedFolder, truth: Truth) -> None:
    async def ask() -> None:
        async with KserveClient(url) as client:
            for model in folder.variants:
                outputs = [value["name"] for value in model.record["outputs"]]
                for batch in (1, 5):
                    image = truth.image_BHW3[:batch]
                    found = await client.infer(model.name, {"image": image}, outputs)
                    local = open_run(model.graph, outputs, threads=1)({"image": image})
                    assert all(np.array_equal(found[output], local[output]) for output in outputs)

    asyncio.run(ask())


def test_requests_share_calls(url: str, truth: Truth) -> None:
    assert all(isinstance(value, dict) for value in asyncio.run(burst(url, truth, 60, "patchrank-keep-0.4")))
    page = urllib.request.urlopen(f"http://{url}/metrics", timeout=10).read().decode()
    values = {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if not line.startswith("#")}
    calls = values['patchrank_batch_images_count{model="patchrank-keep-0.4"}']
    assert calls <= values['patchrank_batch_images_sum{model="patchrank-keep-0.4"}'] / 2


def test_overload_is_refused_and_the_rest_is_right(folder: ServedFolder, truth: Truth, tmp_path: Path) -> None:
    flags = ("--max-queue", "4", "--max-batch", "2")
    with own_server(folder.path, tmp_path / "log.txt", *flags) as url:
        kinds = {type(value) for value in asyncio.run(burst(url, truth, 60))}
        assert kinds == {dict, Refused}
        assert all(isinstance(value, dict) for value in asyncio.run(burst(url, truth, 2)))


def test_sigterm_answers_what_is_inside(folder: ServedFolder, truth: Truth, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with open(log, "w") as file, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        # Without --model: the embedded model, whose graphs are in --out already.
        command = [sys.executable, "-m", "export.serve", "--port", str(port), "--out", str(folder.path.parent)]
        process = subprocess.Popen(command, stdout=file, stderr=file)

    async def stop_under_load() -> list:
        await asyncio.sleep(0.15)
        process.send_signal(signal.SIGTERM)

    async def both() -> list:
        found, _ = await asyncio.gather(burst(f"127.0.0.1:{port}", truth, 60), stop_under_load())
        return found

    try:
        end = time.monotonic() + 90
        while time.monotonic() < end and "serving" not in log.read_text():
            time.sleep(0.1)
        while time.monotonic() < end and {type(v) for v in asyncio.run(burst(f"127.0.0.1:{port}", truth, 1))} != {dict}:
            time.sleep(0.1)
        found = asyncio.run(both())
        assert process.wait(30) in (0, -signal.SIGTERM), log.read_text()
    finally:
        process.kill()
        process.wait(10)
    answered = sum(isinstance(value, dict) for value in found)
    # Connections that came after the signal are turned away; one that was taken gets its answer.
    assert answered > 0 and "Traceback" not in log.read_text()
    errors = {str(value) for value in found if isinstance(value, Failed)}
    assert not [error for error in errors if "disconnected" in error.lower()], errors


def test_the_load_command_finds_no_wrong_answer(folder: ServedFolder, tmp_path: Path) -> None:
    flags = ["--model", str(folder.path), "--seconds", "8", "--load", "0.5", "1.5", "--images", "16"]
    flags += ["--batch", "1", "1", "3", "--out", str(tmp_path)]
    result = subprocess.run([sys.executable, "-m", "export.load", *flags], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "serving_load.json").read_text())
    assert [(row["load"], row["mode"]) for row in found["rows"]] == [
        (load, mode) for load in (0.5, 1.5) for mode in ("fixed", "adaptive")
    ]
    assert (found["total"]["wrong"], found["total"]["lost"]) == (0, 0)
    assert all(row["answered"] > 0 and row["ms_p99"] >= row["ms_p50"] for row in found["rows"])
    assert {"command", "versions", "machine", "config", "capacity_images_per_s"} < set(found)
    assert (found["server"]["name"], found["server"]["threads"]) == ("patchrank", 1)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; skips by name where it is absent."""
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are absent (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1180,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, url: str):
    browser.get(f"http://{url}/")
    until(browser, "document.body.dataset.ready === 'yes'")
    return browser


def until(browser, condition: str, seconds: float = 30.0) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda one: one.execute_script(f"return {condition}"), condition)


def click(browser, selector: str) -> None:
    browser.find_element("css selector", selector).click()


def names(browser) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('#top .name')].map(e => e.textContent)")


def dark_share(browser) -> float:
    """Share of the canvas's patches whose pixels are all dark."""
    script = """
    const canvas = document.getElementById("canvas"), context = canvas.getContext("2d"), side = canvas.width / 14;
    let dark = 0;
    for (let row = 0; row < 14; row++) for (let column = 0; column < 14; column++) {
      const data = context.getImageData(column * side + 8, row * side + 8, side - 16, side - 16).data;
      let brightest = 0;
      for (let i = 0; i < data.length; i += 4) brightest = Math.max(brightest, data[i], data[i + 1], data[i + 2]);
      dark += brightest < 70;
    }
    return dark / 196;"""
    return browser.execute_script(script)


DONE = "document.getElementById('status').textContent === '' && !document.getElementById('canvas').hidden"


def test_the_page_shows_an_example_and_its_kept_patches(page) -> None:
    click(page, "#example")
    until(page, DONE)
    assert page.find_element("id", "patches").text.startswith("118 of 196 patches")
    assert len(names(page)) == 5 and names(page)[0] == "three", "canvas 3 shows a three"
    assert dark_share(page) == pytest.approx(78 / 196, abs=0.06)
    click(page, ".variant:last-child")
    until(page, "document.getElementById('canvas').dataset.kept === '78'")
    assert dark_share(page) == pytest.approx(118 / 196, abs=0.06)
    click(page, "#dim")
    assert dark_share(page) < 0.1
    click(page, "#dim")
    click(page, ".variant:first-child")
    until(page, "document.getElementById('canvas').dataset.kept === '196'")
    assert dark_share(page) < 0.1
    if picture := os.environ.get("PATCHRANK_SCREENSHOT"):
        click(page, ".variant:nth-child(2)")
        page.save_screenshot(picture)
    severe = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def test_a_picture_can_be_dropped_or_chosen(page, tmp_path: Path) -> None:
    from patchrank.data.digits import draw_digit

    path = tmp_path / "wide.png"
    draw_digit("test/000007").resize((300, 300)).crop((0, 40, 300, 260)).save(path)
    page.find_element("id", "file").send_keys(str(path))
    until(page, DONE)
    assert len(names(page)) == 5
    page.refresh()
    until(page, "document.body.dataset.ready === 'yes'")
    page.execute_script(
        """
        const canvas = document.createElement("canvas");
        canvas.width = 200; canvas.height = 100;
        canvas.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "drop.png", { type: "image/png" }));
          document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        });"""
    )
    until(page, DONE)
    assert len(names(page)) == 5


def test_own_classes_and_mistakes(page, tmp_path: Path) -> None:
    click(page, "#example")
    until(page, DONE)
    page.find_element("id", "names").send_keys("three, seven")
    click(page, "#classes [type=submit]")
    until(page, "document.querySelectorAll('#top .name').length === 2")
    assert names(page)[0] == "three"
    page.find_element("id", "names").clear()
    page.find_element("id", "names").send_keys("three")
    click(page, "#classes [type=submit]")
    until(page, "document.getElementById('status').classList.contains('wrong')")
    assert "give 2 to 200" in page.find_element("id", "status").text
    click(page, "#reset")
    until(page, "document.querySelectorAll('#top .name').length === 5")
    path = tmp_path / "no.png"
    path.write_bytes(b"no picture")
    page.find_element("id", "file").send_keys(str(path))
    until(page, "document.getElementById('status').classList.contains('wrong')")
    assert "not a picture" in page.find_element("id", "status").text
