"""From what a stretch of load saw to its row in serving_load.json, and to the table."""

from typing import Any

import numpy as np

from export.load_run import Seen
from export.serve_folder import ServedFolder


def row_of(
    folder: ServedFolder, seen: Seen, *, mode: str, load: float, offered: float, switches: int
) -> dict[str, Any]:
    """One row; shares and accuracies are fractions, times milliseconds. None where there is nothing to say."""
    images = sum(seen.images.values())
    macs = {model.name: model.macs_share for model in folder.variants}
    p50, p90, p99 = np.percentile(seen.latencies_ms, (50, 90, 99)) if seen.latencies_ms else (None,) * 3
    answers = bool(images and folder.class_names)
    labelled = answers and seen.dense_right > 0
    return {
        "mode": mode,
        "load": load,
        "offered_images_per_s": offered,
        "seconds": seen.seconds,
        "num_requests": seen.requests,
        "num_images": images,
        "answered": seen.answered,
        "refused": seen.refused,
        "lost": seen.lost,
        "wrong": seen.wrong,
        "ms_p50": _number(p50),
        "ms_p90": _number(p90),
        "ms_p99": _number(p99),
        "images_per_s": images / seen.seconds,
        "macs_share": sum(count * macs[name] for name, count in seen.images.items()) / images if images else None,
        "share_by_model": {name: count / images for name, count in sorted(seen.images.items())},
        "switches": switches,
        "agreement_with_dense": seen.same / images if answers else None,
        "accuracy": seen.right / images if labelled else None,
        "accuracy_given_up": (seen.dense_right - seen.right) / images if labelled else None,
        "errors": dict(seen.errors.most_common(5)),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'mode':9} {'load':>5} {'offered/s':>9} {'done/s':>7} {'p50 ms':>8} {'p99 ms':>8} {'refused':>7} {'lost':>5} "
        f"{'wrong':>5} {'MACs':>5} {'accuracy':>8} {'given up':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['mode']:9} {row['load']:5.2f} {row['offered_images_per_s']:9.1f} {row['images_per_s']:7.1f} "
            f"{_text(row['ms_p50'], 8, 1)} {_text(row['ms_p99'], 8, 1)} {row['refused']:7} {row['lost']:5} "
            f"{row['wrong']:5} {_text(row['macs_share'], 5, 2)} {_text(row['accuracy'], 8, 3)} "
            f"{_text(row['accuracy_given_up'], 8, 3)}"
        )
    return "\n".join(lines)


def _text(value: float | None, width: int, digits: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"
