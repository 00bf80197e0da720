"""From the files of finished runs to the study's rows, verdicts and figures: pure functions of what is on disk."""

import io
import json
import math
import statistics
from pathlib import Path

from eval.tables import as_text
from patchrank.atomic import write_bytes
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import run_macs
from patchrank.pretrain.journal import read_log

MAIN = "t2i@5"
"""End of the name of the retrieval metric that tables show."""
_RATES = ("images_per_s", "tokens_per_s", "teacher_share")


def study_rows(out: Path, jobs: list) -> list[dict]:
    """One row a finished run: recipe, tier, seed, steps, seconds, macs, test metrics, and checks on the way."""
    rows = []
    for job in jobs:
        folder = out / "runs" / job.name
        if not (folder / "clip.json").is_file():
            continue
        recipe = json.loads((folder / "clip.json").read_text())["recipe"]
        settings, log = recipe["settings"], read_log(folder)
        macs, steps = macs_of_run(settings), settings["num_steps"]
        rates = [{name: row[name] for name in _RATES} for row in log if "images_per_s" in row]
        seconds = recipe["processor_seconds"]
        rows.append(
            {
                "recipe": job.recipe,
                "tier": job.tier,
                "seed": job.seed,
                "steps": steps,
                "seconds": seconds,
                "macs": macs,
                "images_per_s": statistics.median(row["images_per_s"] for row in rates) if rates else None,
                "teacher_share": statistics.median(row["teacher_share"] for row in rates) if rates else None,
                "metrics": recipe["metrics"].get("test", {}),
                "checks": [
                    {"seconds": seconds * done / macs, "macs": done, **checked}
                    for row in log
                    if (checked := {name: value for name, value in row.items() if " " in name})
                    and (done := macs_of_run(settings, row["step"]))
                ],
                "num_test": recipe["num_test"],
            }
        )
    return rows


def macs_of_run(settings: dict, until: int | None = None) -> int:
    """Multiply-accumulates of all steps of a run, or of the first ones, from its saved settings."""
    return run_macs(PretrainConfig(**settings), until)


def spread(rows: list[dict], metric: str) -> tuple[float, float]:
    """Mean of a metric over seeds, and its standard error.

    The error is the larger of two: that of the test pictures alone (binomial, retrieval by pictures), and that of the
    seeds where there are several. With two seeds it is still rough; a verdict says so by its interval.
    """
    values = [row["metrics"][metric] for row in rows]
    mean = statistics.fmean(values)
    num_test = rows[0]["num_test"]
    num = num_test.get(metric) or num_test[metric.split(" ")[0]]
    sampling = math.sqrt(max(mean * (1 - mean), 1e-9) / num)
    seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, max(sampling, seeds)


def verdicts(rows: list[dict], base: str = "clip") -> list[dict]:
    """Each recipe against another one of the same tier.

    A difference counts if it is larger than its 95 % interval; else the verdict is "not testable at this scale".
    """
    found = []
    for tier in sorted({row["tier"] for row in rows}):
        own = [row for row in rows if row["tier"] == tier]
        plain = [row for row in own if row["recipe"] == base]
        for recipe in dict.fromkeys(row["recipe"] for row in own if row["recipe"] != base):
            mine = [row for row in own if row["recipe"] == recipe]
            for metric in mine[0]["metrics"]:
                if plain and all(metric in row["metrics"] for row in plain):
                    found.append({"recipe": recipe, "tier": tier, "metric": metric} | _against(mine, plain, metric))
    return found


def _against(mine: list[dict], plain: list[dict], metric: str) -> dict:
    mean, error = spread(mine, metric)
    other, other_error = spread(plain, metric)
    half = 1.96 * math.hypot(error, other_error)
    difference = mean - other
    verdict = "not testable at this scale" if abs(difference) <= half else "better" if difference > 0 else "worse"
    return {"value": mean, "base": other, "difference": difference,
            "interval": [difference - half, difference + half], "verdict": verdict}  # fmt: skip


def main_metrics(rows: list[dict]) -> list[str]:
    """What tables show: accuracies, and of retrieval the MAIN one."""
    metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
    return [name for name in metrics if "@" not in name or name.endswith(MAIN)]


def as_lines(rows: list[dict]) -> str:
    """The table for a terminal: percent, mean over seeds."""
    metrics, lines = main_metrics(rows), []
    for tier, recipe in dict.fromkeys((row["tier"], row["recipe"]) for row in rows):
        own = [row for row in rows if (row["tier"], row["recipe"]) == (tier, recipe)]
        cells = [f"{100 * statistics.fmean(row['metrics'].get(name, math.nan) for row in own):.1f}" for name in metrics]
        minutes = statistics.fmean(row["seconds"] for row in own) / 60
        petamacs = statistics.fmean(row["macs"] for row in own) / 1e15
        lines.append([recipe, str(tier), str(len(own)), f"{minutes:.1f}", f"{petamacs:.2f}", *cells])
    return as_text(["recipe", "tier", "seeds", "minutes", "PMAC", *metrics], lines)


def draw(path: Path, rows: list[dict]) -> None:
    """Checks on the way against processor minutes and against MACs, one line a run, one panel a metric and axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = dict.fromkeys(name for row in rows for check in row["checks"] for name in check if " " in name)
    metrics = [name for name in names if "@" not in name or name.endswith(MAIN)]
    if not metrics:
        return
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    figure, axes = plt.subplots(2, len(metrics), figsize=(4 * len(metrics), 6), squeeze=False)
    for column, metric in enumerate(metrics):
        for line, (key, unit, label) in enumerate((("seconds", 60, "processor minutes"), ("macs", 1e15, "PMAC"))):
            pane = axes[line][column]
            for row in rows:
                points = [(check[key] / unit, 100 * check[metric]) for check in row["checks"] if metric in check]
                if points:
                    style = "-" if row["tier"] == 1 else ":"
                    colour = f"C{recipes.index(row['recipe']) % 10}"
                    pane.plot(*zip(*points), style, color=colour, marker=".",
                              label=row["recipe"] if row["seed"] == 0 else None)  # fmt: skip
            pane.set(xlabel=label, ylabel="%", title=metric)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    write_bytes(path, file.getvalue())
