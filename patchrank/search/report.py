"""What a finished search leaves beside its store: results.json, results.csv, and picture sheets on request."""

import re
from pathlib import Path

from tqdm import tqdm

from patchrank.atomic import write_bytes
from patchrank.data import BrokenImage
from patchrank.search import table
from patchrank.search.explain import Sheet, make_sheet
from patchrank.search.pictures import draw_overview, draw_sheet
from patchrank.search.plan import Plan
from patchrank.search.store import RankingStore


def write_table(folder: Path, plan: Plan, store: RankingStore, keeps: tuple[float, ...], *, quiet: bool = False) -> str:
    """Write results.json and results.csv; returns the table as text."""
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    with tqdm(total=len(store.ids), unit=" images", bar_format=form, disable=quiet, desc="table", leave=False) as bar:
        results = table.evaluate(plan, store, keeps, bar.update)
    table.write(folder, plan, store, results)
    return table.text_table(plan, results)


def write_pictures(
    folder: Path, plan: Plan, store: RankingStore, keeps: tuple[float, ...], num_sheets: int, *, quiet: bool = False
) -> list[Path]:
    """Write the sheets of the store's first `num_sheets` images and overview.png into <folder>/pictures."""
    by_id = {item.id: item for item in plan.items}
    sheets: list[Sheet] = []
    paths: list[Path] = []
    for image_id, order_N in tqdm(
        list(zip(store.ids, store.order_BN))[:num_sheets], unit=" sheets", disable=quiet, desc="pictures", leave=False
    ):
        try:
            sheets.append(make_sheet(plan, by_id[image_id], order_N, keeps))
        except BrokenImage:  # it was whole when it was ranked
            continue
        paths.append(folder / "pictures" / f"{len(paths):03d}_{_file_name(image_id)}.png")
        write_bytes(paths[-1], draw_sheet(sheets[-1]))
    if sheets:
        request = plan.request
        how = f"{request['strategy']}, {request['criterion']}, {request['rest']} at layer {request['layer']}"
        title = f"{request['data']} {request['split']}: {how}"
        paths.append(folder / "pictures" / "overview.png")
        write_bytes(paths[-1], draw_overview(sheets, title))
    return paths


def _file_name(image_id: str) -> str:
    stem = image_id.rpartition(".")[0] or image_id
    return re.sub(r"[^\w-]+", "_", stem)[-80:]
