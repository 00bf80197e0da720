"""search/store.py and runner.py: whole, self-checking, resumable; the same bytes however the run was cut up."""

import errno
import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank import atomic
from patchrank.data import BrokenImage, Item
from patchrank.errors import UserError
from patchrank.search.ranking import ranking_from_order, ranking_from_removal, ranking_from_score
from patchrank.search.runner import Job, num_left, run_search, search_shard, seed_of, spread
from patchrank.search.store import (
    SCHEMA,
    RankingMismatch,
    begin,
    complete,
    is_complete,
    open_store,
    read_shard,
    shard_path,
    write_shard,
)
from patchrank.search.strategies import STRATEGIES, Options
from patchrank.spec import PruneSpec

ITEMS = [Item(f"val/{number:03d}.png", number % 3) for number in range(7)]
BROKEN = "val/004.png"


def image(item: Item) -> torch.Tensor:
    if item.id == BROKEN:
        raise BrokenImage(f"{item.id}: truncated")
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(item.id[4:7])))


def job_of(strategy: str = "sweep") -> Job:
    spec = PruneSpec(cuts=((2, 1.0),))
    return Job(
        make_tower(),
        image,
        spec,
        "preservation",
        strategy,
        Options(masks=20, randoms=4, mutations=1, rounds=2, steps=4),
        seed=0,
        chunk=16,
    )


def request_of(**changes) -> dict:
    request = dict(schema=SCHEMA, weights_hash="a" * 64, layer=2, num_patches=16, shard_size=2, strategy="sweep")
    return request | changes


def search(store: Path, items=ITEMS, size: int = 2, strategy: str = "sweep", **place) -> bool:
    request = request_of(shard_size=size, strategy=strategy)
    return run_search(job_of(strategy), items, request, store, quiet=True, **place)


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "store"
    assert search(store)
    return store


def test_a_finished_store_reads_back_what_was_found(whole: Path) -> None:
    store = open_store(whole, weights_hash="a" * 64, layer=2)
    good = [item for item in ITEMS if item.id != BROKEN]
    _, _, rankings = search_shard(job_of(), ITEMS, lambda: None)
    assert store.ids == [item.id for item in good] and store.broken == [BROKEN]
    assert store.order_BN.dtype == torch.int16 and store.score_BN.dtype == torch.float32
    assert torch.equal(store.order_BN, torch.stack([ranking.order_N for ranking in rankings]))
    assert torch.equal(store.score_BN, torch.stack([ranking.score_N for ranking in rankings]))
    assert torch.equal(store.trace_BN, torch.stack([ranking.trace_N for ranking in rankings]))
    assert store.request == request_of()
    assert store.index(["val/006.png", "val/000.png"]).tolist() == [5, 0]
    with pytest.raises(RankingMismatch, match=r"val/004\.png: has no ranking"):
        store.index([BROKEN])


def test_a_store_holds_nothing_but_its_files(whole: Path) -> None:
    shards = [f"shards/{index:05d}.safetensors" for index in range(4)]
    assert sorted(content(whole)) == sorted(["manifest.json", "search.json", *shards])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_number_of_ranks_in_any_order_gives_the_same_bytes(tmp_path: Path, whole: Path, order) -> None:
    completed = [search(tmp_path, rank=rank, world=3) for rank in order]
    assert completed == [False, False, True]
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_resumes_to_the_same_bytes(tmp_path: Path, strategy: str) -> None:
    items = ITEMS[:3]
    search(tmp_path / "whole", items, 1, strategy)
    search(tmp_path / "again", items, 1, strategy)
    (tmp_path / "again" / "manifest.json").unlink()
    shard_path(tmp_path / "again", 1).unlink()
    assert num_left(items, 1, tmp_path / "again") == 1
    search(tmp_path / "again", items, 1, strategy)
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rankings_do_not_depend_on_shards_limit_or_company(tmp_path: Path, strategy: str) -> None:
    few, many = ITEMS[1:3], ITEMS[:4]
    search(tmp_path / "few", few, 1, strategy)
    search(tmp_path / "many", many, 3, strategy)
    few_store, many_store = open_store(tmp_path / "few"), open_store(tmp_path / "many")
    rows = many_store.index(few_store.ids)
    assert torch.equal(many_store.order_BN[rows], few_store.order_BN)
    assert torch.equal(many_store.score_BN[rows], few_store.score_BN)


@pytest.mark.parametrize("writes", [0, 1, 3, 5])
def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path, whole: Path, monkeypatch, writes: int) -> None:
    real, count = atomic.os.fsync, itertools.count()

    def fsync(file: int) -> None:
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(OSError) as raised:
        search(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    left = content(tmp_path)
    assert len(left) == writes and all(content(whole)[name] == data for name, data in left.items())
    assert search(tmp_path)
    assert content(tmp_path) == content(whole)


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".00001.safetensors.x1.tmp").write_bytes(b"half")
    (tmp_path / ".search.json.x2.tmp").write_bytes(b"{")
    search(tmp_path)
    assert content(tmp_path) == content(whole)


def test_of_many_that_finish_together_one_completes(tmp_path: Path) -> None:
    request = request_of()
    begin(tmp_path, request, 1)
    write_shard(tmp_path, 0, request, ["a"], [], [ranking_from_score(torch.arange(16.0))])
    start, found = threading.Barrier(8), []

    def finish() -> None:
        start.wait()
        found.append(complete(tmp_path, request, 1))

    workers = [threading.Thread(target=finish) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found) == [False] * 7 + [True]
    assert sorted(content(tmp_path)) == ["manifest.json", "search.json", "shards/00000.safetensors"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, whole: Path, monkeypatch) -> None:
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("patchrank.search.store.os.link", link)
    assert search(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_deleted_shard_is_made_again_and_the_old_manifest_with_it(tmp_path: Path, whole: Path) -> None:
    search(tmp_path)
    shard_path(tmp_path, 2).unlink()
    assert not is_complete(tmp_path, request_of())
    assert search(tmp_path)
    assert content(tmp_path) == content(whole)
    assert not search(tmp_path)  # nothing left to complete


@pytest.mark.parametrize("changes", [dict(layer=3), dict(strategy="greedy"), dict(extra=1)])
def test_a_store_of_another_request_is_refused_untouched(tmp_path: Path, changes: dict) -> None:
    search(tmp_path, ITEMS[:2])
    before = content(tmp_path)
    with pytest.raises(RankingMismatch, match=next(iter(changes))) as raised:
        begin(tmp_path, request_of(**changes), 1)
    assert "use another --out" in str(raised.value) and "\n" not in str(raised.value)
    assert content(tmp_path) == before


def test_readers_refuse_other_weights_another_cut_and_unfinished_stores(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RankingMismatch, match="made with weights aaaaaaaaaaaa, this model has bbbbbbbbbbbb"):
        open_store(whole, weights_hash="b" * 64)
    with pytest.raises(RankingMismatch, match="made for layer 2, not 3"):
        open_store(whole, layer=3)
    with pytest.raises(RankingMismatch, match=r"no manifest\.json"):
        open_store(tmp_path)
    begin(tmp_path, request_of(schema=99), 1)
    with pytest.raises(RankingMismatch, match="schema 99"):
        open_store(tmp_path, partial=True)


def test_an_unfinished_store_can_be_read_on_request(tmp_path: Path, whole: Path) -> None:
    search(tmp_path, rank=1, world=2)
    part = open_store(tmp_path, partial=True)
    rows = open_store(whole).index(part.ids)
    assert 0 < len(part.ids) < 6
    assert torch.equal(part.order_BN, open_store(whole).order_BN[rows])
    empty = tmp_path / "empty"
    begin(empty, request_of(), 1)
    nothing = open_store(empty, partial=True)
    assert nothing.ids == [] and nothing.order_BN.shape == nothing.trace_BN.shape == (0, 16)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_changed_byte_of_a_finished_shard_is_noticed(whole: Path, data) -> None:
    path = shard_path(whole, 0)
    good = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[place] ^= 1 << bit
    try:
        path.write_bytes(bytes(bad))
        with pytest.raises(RankingMismatch, match=r"00000\.safetensors"):
            open_store(whole)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"", lambda data: data[:-1] + b"\xff"])
def test_a_damaged_shard_stops_a_resumed_search_by_name_and_nothing_else_is_lost(
    tmp_path: Path, whole: Path, damage
) -> None:
    search(tmp_path)
    (tmp_path / "manifest.json").unlink()
    path = shard_path(tmp_path, 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RankingMismatch, match=r"00001\.safetensors.*delete") as raised:
        search(tmp_path)
    assert "\n" not in str(raised.value)
    path.unlink()
    assert search(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_shard_of_another_search_is_not_taken_for_ours(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, request_of(seed=1), ["a"], [], [ranking_from_score(torch.arange(16.0))])
    with pytest.raises(RankingMismatch, match="belongs to another search"):
        read_shard(shard_path(tmp_path, 0), request_of(seed=2))


@pytest.mark.parametrize("name", ["search.json", "manifest.json"])
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_damaged_json_is_named(tmp_path: Path, name: str, text: str) -> None:
    search(tmp_path, ITEMS[:2])
    (tmp_path / name).write_text(text)
    with pytest.raises(RankingMismatch, match=name):
        open_store(tmp_path, partial=name == "search.json")


def test_a_search_of_broken_images_only_gives_an_empty_store(tmp_path: Path) -> None:
    assert search(tmp_path, [ITEMS[4]])
    assert open_store(tmp_path).broken == [BROKEN] and open_store(tmp_path).score_BN.shape == (0, 16)


@given(st.sets(st.text(min_size=1, max_size=8), max_size=30), st.data())
def test_smaller_limits_are_nested_in_larger_ones(ids: set[str], data) -> None:
    items = [Item(image_id) for image_id in sorted(ids)]
    few, many = sorted(data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=2)))
    assert spread(items, few) == spread(items, many)[:few] == spread(items[::-1], None)[:few]


@pytest.mark.parametrize("limit", [0, -3])
def test_limits_below_one_are_refused(limit: int) -> None:
    with pytest.raises(UserError, match=f"--limit {limit}"):
        spread(ITEMS, limit)


def test_seeds_belong_to_images() -> None:
    assert len({seed_of(seed, item.id) for seed in (0, 1) for item in ITEMS}) == 14
    assert 0 <= seed_of(0, "a") < 2**63


@given(st.permutations(range(9)))
def test_rankings_agree_on_order_and_score(order: list[int]) -> None:
    by_order = ranking_from_order(order)
    by_score = ranking_from_score(by_order.score_N)
    values = [float(step) for step in range(8)]
    by_removal = ranking_from_removal(order[:0:-1], values, 9)
    for ranking in (by_order, by_score, by_removal):
        assert ranking.order_N.tolist() == order and ranking.order_N.dtype == torch.int16
        assert ranking.score_N[order[0]] == 1 and ranking.score_N[order[-1]] == 0
    assert by_removal.trace_N[order[::-1][:8]].tolist() == values


def test_the_manifest_says_what_the_shards_hold(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["num_images"] == 6 and manifest["broken"] == [BROKEN]
    for shard in manifest["shards"]:
        assert atomic.sha256_of(whole / shard["file"]) == shard["sha256"]
