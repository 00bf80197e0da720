"""The load command's parts: arrivals, counting, comparing, rows, flags; the server is a function."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from fake_export import SIZE, write_export
from hypothesis import given, settings
from hypothesis import strategies as st

from export.client import Failed, Refused
from export.load import LoadConfig, check
from export.load_report import row_of, table
from export.load_run import Arrival, arrivals, capacity, drive
from export.load_truth import Truth
from export.serve_folder import open_folder
from patchrank.errors import UserError

DENSE, HALF = "patchrank-keep-1", "patchrank-keep-0.5"
FEATURE = np.eye(4, dtype=np.float32)
TRUTH = Truth(
    ids=["a", "b", "c", "d"],
    image_BHW3=np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, SIZE, SIZE, 3), np.uint8),
    label_B=np.array([0, 1, 2, 0]),
    feature_BD={DENSE: FEATURE, HALF: -FEATURE},
    best_B={DENSE: np.array([0, 1, 2, 2]), HALF: np.array([0, 1, 1, 0])},
    limit=1e-4,
    unstable=[],
)


async def honest(image_BHW3: np.ndarray, model: str = HALF) -> tuple[str, dict[str, np.ndarray]]:
    rows = image_BHW3[:, 0, 0, 0]
    best = np.stack([TRUTH.best_B[model][rows], rows], axis=1)
    return model, {"feature": TRUTH.feature_BD[model][rows], "top5_index": best}


def plan(*rows: list[int]) -> list[Arrival]:
    return [Arrival(0.001 * number, np.array(row)) for number, row in enumerate(rows)]


def driven(ask, requests: list[Arrival], **changes):
    return asyncio.run(drive(requests, ask, TRUTH, DENSE, **({"max_inside": 9, "patience_s": 0.2} | changes)))


@settings(max_examples=8, deadline=None)
@given(st.floats(50, 150), st.sampled_from([(1,), (1, 1, 4)]), st.integers(0, 9))
def test_arrivals_are_poisson_and_repeatable(rate: float, batches: tuple[int, ...], seed: int) -> None:
    found = arrivals(rate, 10.0, batches, 4, np.random.default_rng(seed))
    again = arrivals(rate, 10.0, batches, 4, np.random.default_rng(seed))
    assert [arrival.due_s for arrival in found] == [arrival.due_s for arrival in again]
    due = [arrival.due_s for arrival in found]
    assert due == sorted(due) and due[-1] < 10.0
    images = sum(len(arrival.rows) for arrival in found)
    assert abs(images - 10 * rate) < 6 * np.sqrt(10 * rate) * max(batches)
    assert {len(arrival.rows) for arrival in found} <= set(batches)


def test_answers_are_counted_by_image_and_compared() -> None:
    seen = driven(honest, plan([0], [1, 2], [3]))
    assert (seen.answered, seen.refused, seen.lost, seen.wrong) == (3, 0, 0, 0)
    assert seen.images == {HALF: 4}
    assert (seen.same, seen.right, seen.dense_right) == (2, 3, 3)
    assert len(seen.latencies_ms) == 3


@pytest.mark.parametrize(
    "name, change",
    [
        ("feature", lambda value: value + 2e-4),
        ("feature", lambda value: value[::-1]),
        ("feature", lambda value: value[:1]),
        ("feature", lambda value: value * np.nan),
        ("top5_index", lambda value: value + 1),
    ],
)
def test_a_wrong_answer_is_seen(name: str, change) -> None:
    async def lying(image_BHW3):
        model, values = await honest(image_BHW3)
        return model, values | {name: change(values[name])}

    assert driven(lying, plan([0, 1])).wrong == 1


def test_every_request_is_counted_once() -> None:
    calls = iter(range(100))

    async def moody(image_BHW3):
        number = next(calls)
        if number == 1:
            raise Refused("7 images are waiting")
        if number == 2:
            raise Failed("connection reset")
        if number == 3:
            await asyncio.sleep(60)
        return await honest(image_BHW3)

    seen = driven(moody, plan([0], [1], [2], [3], [0]))
    assert (seen.answered, seen.refused, seen.lost, seen.requests) == (2, 1, 2, 5)
    assert seen.errors["# images are waiting"] == 1
    assert any("no answer within 0.2 s" in error for error in seen.errors)


def test_requests_beyond_the_bound_are_refused_unsent() -> None:
    async def never(image_BHW3):
        await asyncio.sleep(60)

    seen = driven(never, plan([0], [0], [0]), max_inside=1)
    assert (seen.refused, seen.lost) == (2, 1)


def test_a_mistake_of_ours_is_not_counted_as_the_servers() -> None:
    async def broken(image_BHW3):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        driven(broken, plan([0]))


def test_latency_counts_from_when_a_request_was_due() -> None:
    seen = driven(honest, [Arrival(-0.5, np.array([0]))])
    assert 500 <= seen.latencies_ms[0] < 1000


def test_accuracy_of_the_variants() -> None:
    assert TRUTH.accuracy() == {DENSE: 0.75, HALF: 0.75}


def test_capacity() -> None:
    async def slow(image_BHW3):
        await asyncio.sleep(0.01)
        return await honest(image_BHW3)

    assert 50 < asyncio.run(capacity(slow, TRUTH, 0.2, inside=2)) < 220

    async def full(image_BHW3):
        raise Refused("full")

    with pytest.raises(Failed):
        asyncio.run(capacity(full, TRUTH, 0.05, inside=2))


def test_a_row_and_its_line(tmp_path: Path) -> None:
    folder = open_folder(write_export(tmp_path))
    seen = driven(honest, plan([0], [1], [2], [3]))
    row = row_of(folder, seen, mode="adaptive", load=1.5, offered=30.0, switches=2)
    assert (row["macs_share"], row["accuracy"], row["accuracy_given_up"]) == (0.6, 0.75, 0.0)
    assert row["share_by_model"] == {HALF: 1.0} and row["ms_p50"] <= row["ms_p90"] <= row["ms_p99"]
    empty = row_of(folder, driven(honest, []), mode="fixed", load=0.5, offered=3.0, switches=0)
    assert empty["ms_p99"] is None and empty["accuracy"] is None
    json.dumps([row, empty], allow_nan=False)
    assert len(table([row, empty]).splitlines()) == 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"url": "example.org:80"}, "loopback"),
        ({"url": "10.0.0.1:8000"}, "loopback"),
        ({"url": "127.0.0.1"}, "host:port"),
        ({"grpc": "127.0.0.1:8001"}, "goes with --url"),
        ({"load": ()}, "multiples"),
        ({"load": (0.0,)}, "multiples"),
        ({"batch": (0,)}, "1 or more"),
        ({"seconds": 1.0}, "5 to 3600"),
        ({"seconds": 1e6}, "5 to 3600"),
        ({"reload": 2.0}, "needs --url"),
        ({"target": -1.0}, "0 or more"),
        ({"images": 0}, "above 0"),
    ],
)
def test_bad_flags(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(LoadConfig(**changes))


def test_good_flags() -> None:
    check(LoadConfig())
    check(LoadConfig(url="127.0.0.1:8000", grpc="localhost:8001", reload=5.0))
    check(LoadConfig(url="[::1]:8000"))
