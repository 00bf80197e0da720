"""`python -m eval suite`: everything for one model: accuracy of all methods on all data sets at equal MACs, speed, and
pictures of what is kept. What the folder holds is not measured again; a kill costs at most 64 images of one data set.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from eval.measuring import Bench, MeasureConfig, open_bench
from eval.records import DENSE, read_records
from eval.report_data import SUITE
from eval.rival_files import parse_files
from eval.rivals import OURS, RIVALS
from eval.suite_accuracy import check_protocol, measure_set
from eval.suite_config import SuiteConfig, check, file_stem
from eval.suite_methods import Built, build_all, is_oracle
from eval.suite_pictures import write_pictures
from eval.suite_sets import Absent, Present, default_sets, describe, find_sets
from eval.suite_speed import write_speed
from patchrank.atomic import write_json
from patchrank.loading import load_clip
from patchrank.provenance import command, machine, versions

_SEARCHED = 4
"""Images per call of an oracle: it searches one after the other, and small calls share out evenly among threads."""


def main(config: SuiteConfig) -> None:
    """Measure what `--out` lacks."""
    watch, before = Stopwatch(), len(read_records(config.out))
    check(config)
    check_protocol(config.protocol)
    files = parse_files(config.files)
    clip = load_clip(config.model, config.pretrained, config.device)
    names = config.datasets or default_sets(clip)
    present, absent = find_sets(names, config.data_root, config.num_images)
    with open_bench(_bench_config(config, config.num_images), clip) as bench:
        methods = list(dict.fromkeys((OURS, *config.methods)))
        quick = build_all(clip.tower, [name for name in methods if not is_oracle(name)], config.macs, files)
        slow = build_all(clip.tower, [name for name in methods if is_oracle(name)], config.macs, files)
        bench.methods, bench.unreached = quick.methods, [*quick.unreached, *slow.unreached]
        print(_opening(config, bench, slow, present, absent), flush=True)
        with watch("accuracy"):
            _measure(config, bench, present)
        _write_suite(config, bench, present, absent)
        with watch("speed"):
            for runtime in config.runtimes:
                write_speed(config, bench, runtime)
        with watch("pictures"):
            write_pictures(config, bench, [one for one in present if one.dataset.class_names])
        if len(slow.methods) > 1:
            asked = _bench_config(config, config.num_oracle)
            small = replace(asked, batch_size=min(asked.batch_size, _SEARCHED))
            few = replace(bench, config=small, methods=slow.methods)
            with watch("oracles"):
                _measure(config, few, present)
        _write_suite(config, bench, present, absent, {"seconds": watch.so_far(), "records_before": before})
    print(f"done: python -m eval report --results {config.out} makes the pages")


class Stopwatch:
    """Seconds of each part of a run, by name, and of the whole run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what the block does."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    def so_far(self) -> dict[str, float]:
        """Every part, and `total` since this was made, loading included."""
        return self.seconds | {"total": round(time.perf_counter() - self.start, 1)}


def _bench_config(config: SuiteConfig, limit: int | None) -> MeasureConfig:
    same = "model pretrained data_root batch_size threads device cache seed"
    return MeasureConfig(**{name: getattr(config, name) for name in same.split()}, methods=(DENSE,), limit=limit)


def _measure(config: SuiteConfig, bench: Bench, present: Sequence[Present]) -> None:
    for one in present:
        found = measure_set(config, bench, one)
        dense = found[0]
        print(
            f"{one.dataset.name}: {len(found)} rows, {dense.protocol}, {dense.num_images} images, "
            f"unpruned {'top-1' if dense.main_metric == 'acc1' else dense.main_metric} {100 * dense.main:.1f} %",
            flush=True,
        )


def _opening(
    config: SuiteConfig, bench: Bench, slow: Built, present: Sequence[Present], absent: Sequence[Absent]
) -> str:
    """What is about to happen, in a few lines."""
    lines = [f"{bench.clip.model_name}: {len(bench.methods) - 1} rows at {_percents(config.macs)} % of the MACs"]
    if len(slow.methods) > 1:
        lines.append(f"  {len(slow.methods) - 1} oracle rows on {config.num_oracle} images of each set, at the end")
    lines += [f"  {one.dataset.name}: {one.text}" for one in present]
    lines += [f"  {one.name}: {one.state} ({one.text})" for one in absent]
    return "\n".join([*lines, *_skipped(bench)])


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:g}" for share in shares)


def _skipped(bench: Bench) -> list[str]:
    """One line per reason, for all budgets that it holds for."""
    budgets: dict[tuple[str, str], list[float]] = {}
    for one in bench.unreached:
        budgets.setdefault((one.method, one.reason), []).append(one.macs)
    return [f"  no row for {name} at {_percents(shares)} %: {reason}" for (name, reason), shares in budgets.items()]


def _write_suite(
    config: SuiteConfig, bench: Bench, present: Sequence[Present], absent: Sequence[Absent], run: dict | None = None
) -> None:
    """suite_<model>.json: data sets, methods and the setting, for the report; `run`, once done: how long it took."""
    measured = {one.method for one in read_records(config.out) if one.weights_hash == bench.clip.weights_hash}
    reasons = {one.method: one.reason for one in bench.unreached}
    methods = [
        {"name": name, "text": row.text, "state": "measured"}
        if name in measured
        else {"name": name, "text": row.text, "state": "skipped", "reason": reasons.get(name, "left out by --methods")}
        for name, row in RIVALS.items()
    ]
    value = {
        "kind": SUITE,
        "schema": 1,
        "model": bench.clip.model_name,
        "pretrained": Path(bench.clip.pretrained).name,
        "weights_hash": bench.clip.weights_hash,
        "command": command("eval"),
        "versions": versions(),
        "machine": machine() | {"device": config.device},
        "run": run,
        "settings": {
            "macs": list(config.macs),
            "limit": config.num_images,
            "seed": config.seed,
            "oracle_limit": config.num_oracle,
            "protocol": config.protocol,
        },
        "sets": describe(present, absent, config.data_root),
        "methods": methods,
        "unreached": [{"method": one.method, "macs": one.macs, "reason": one.reason} for one in bench.unreached],
    }
    write_json(config.out / f"suite_{file_stem(bench.clip)}.json", value)
