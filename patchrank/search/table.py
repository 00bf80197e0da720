"""The table at the end of a search: what the golden rankings preserve, beside rankings that cost nothing."""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchrank.atomic import write_json, write_text
from patchrank.data import BrokenImage
from patchrank.macs import dense_macs, pruned_macs
from patchrank.provenance import command, machine, versions
from patchrank.search.curves import features_along, free_order, preserved
from patchrank.search.plan import Plan
from patchrank.search.runner import seed_of
from patchrank.search.store import RankingStore
from patchrank.search.variants import prepare
from patchrank.tokens import num_keep

RIVALS = ("random", "checkerboard", "class-attention")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ranking at one keep ratio, mean over the images. Fractions in [0, 1]."""

    ranking: str
    keep: float
    num_kept: int
    macs_share: float
    """MACs of the pruned image tower over those of the dense one, without the scorer."""
    cosine: float
    acc1: float | None
    """Top-1 accuracy; None without labels or class names."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The whole table."""

    num_images: int
    dense_acc1: float | None
    rows: list[Row]


def rivals(plan: Plan) -> list[str]:
    """The free rankings that this tower can have."""
    has_class_token = plan.clip.tower.config.num_prefix > 0
    return [name for name in RIVALS if has_class_token or name != "class-attention"]


def evaluate(plan: Plan, store: RankingStore, keeps: tuple[float, ...], tick: Callable[[], object]) -> Results:
    """Prune every image of the store by its golden order and by the free ones. `tick` is called once an image."""
    config, spec = plan.clip.tower.config, plan.job.spec
    names = ["golden", *rivals(plan)]
    counts = [num_keep(keep, config.num_patches) for keep in keeps]
    by_id = {item.id: item for item in plan.items}
    cosines, hits, dense_hits = [], [], []
    for image_id, order_N in zip(store.ids, store.order_BN, strict=True):
        found = _one_image(plan, by_id[image_id], order_N, names, counts)
        tick()
        if found is None:
            continue
        cosine_SK, hit_SK, dense_hit = found
        cosines.append(cosine_SK)
        if hit_SK is not None:
            hits.append(hit_SK)
            dense_hits.append(dense_hit)
    cosine_SK = torch.stack(cosines).mean(0) if cosines else torch.zeros(len(names), len(counts))
    acc1_SK = torch.stack(hits).mean(0) if hits else None
    dense = dense_macs(config)
    rows = [
        Row(
            ranking=name,
            keep=keep,
            num_kept=counts[k],
            macs_share=pruned_macs(config, spec.with_keep(keep)) / dense,
            cosine=cosine_SK[s, k].item(),
            acc1=None if acc1_SK is None else acc1_SK[s, k].item(),
        )
        for s, name in enumerate(names)
        for k, keep in enumerate(keeps)
    ]
    return Results(num_images=len(cosines), dense_acc1=sum(dense_hits) / len(hits) if hits else None, rows=rows)


def _one_image(plan: Plan, item, golden_N: Tensor, names: list[str], counts: list[int]):
    """Cosines (S, K), hits (S, K) float or None, and whether the dense tower hits; None for an image that broke."""
    job = plan.job
    try:
        image_CHW = job.image(item).to(job.device)
    except BrokenImage:
        return None
    with torch.no_grad():
        variants = prepare(job.tower, image_CHW, job.spec)
        free = [free_order(variants, name, seed_of(job.seed, item.id)) for name in names[1:]]
        order_SN = torch.stack([golden_N.long().to(job.device), *free])
        feature_SKD = features_along(variants, order_SN, counts)
        cosine_SK = preserved(feature_SKD, variants.dense_D).cpu()
        if job.logits is None or item.label is None:
            return cosine_SK, None, None
        hit_SK = (job.logits(feature_SKD.flatten(0, 1)).argmax(-1) == item.label).view(cosine_SK.shape).float().cpu()
        return cosine_SK, hit_SK, float(job.logits(variants.dense_D[None]).argmax(-1).item() == item.label)


def write(folder: Path, plan: Plan, store: RankingStore, results: Results) -> None:
    """<folder>/results.json (with where the numbers come from) and results.csv (the rows)."""
    rows = [asdict(row) for row in results.rows]
    origin = {
        "command": command("patchrank.search"),
        "versions": versions(),
        "machine": machine(),
        "search": plan.request,
    }
    numbers = {"num_images": results.num_images, "broken": store.broken, "dense_acc1": results.dense_acc1}
    write_json(folder / "results.json", origin | numbers | {"rows": rows})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())


def text_table(plan: Plan, results: Results) -> str:
    """The table for a terminal; accuracies in percent."""
    request = plan.request
    dense = "" if results.dense_acc1 is None else f", unpruned top-1 {100 * results.dense_acc1:.1f} %"
    title = (
        f"{request['data']} {request['split']}, {results.num_images} images, {request['rest']} at layer "
        f"{request['layer']}{dense}\ncosine = preservation of the unpruned feature, mean over the images"
    )
    by_name: dict[str, list[Row]] = {}
    for row in results.rows:
        by_name.setdefault(row.ranking, []).append(row)
    first = next(iter(by_name.values()))
    label = {"golden": f"golden ({request['strategy']})"}
    width = max(len(label.get(name, name)) for name in [*by_name, "image-tower MACs"])
    head = [f"keep {row.keep:g} (K = {row.num_kept})" for row in first]
    lines = [title, " " * width + "".join(f"  {text:>20}" for text in head)]
    lines.append(f"{'ranking':{width}}" + f"  {'cosine':>10}{'top-1 %':>10}" * len(first))
    for name, rows in by_name.items():
        cells = "".join(f"  {row.cosine:>10.4f}{_percent(row.acc1):>10}" for row in rows)
        lines.append(f"{label.get(name, name):{width}}" + cells)
    macs = "".join(f"  {f'{100 * row.macs_share:.0f} %':>20}" for row in first)
    return "\n".join([*lines, f"{'image-tower MACs':{width}}" + macs])


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"
