"""The kept patches as one PNG, for readers of the Markdown: per data set a line of best and a line of worst images.

Letters: H rows and W columns of pixels.
"""

import base64
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from eval.report_data import title_of
from eval.report_style import INK, PAPER, SOFT

_SIDE, _TEXT, _HEAD = 1.25, 0.42, 0.42
"""Inches: a picture, the two lines below it, the title of a data set."""
_GREY = np.array([100, 116, 139])


def kept_png(pictures: dict, with_photo: bool) -> bytes | None:
    """One sheet; None without pictures. Args: as of `report_kept.sheets_of`."""
    sheets = pictures.get("sheets", [])
    if not sheets:
        return None
    columns = 2 * max(len(one["best"]) for one in sheets)
    width, height = 0.3 + columns * (_SIDE + 0.06), sum(_HEAD + 2 * (_SIDE + _TEXT) for _ in sheets) + 0.1
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    top = height - 0.08
    for one in sheets:
        photos = with_photo or one.get("drawn", False)
        share = f"{100 * one['macs']:g} % of the MACs"
        title = f"{title_of(one['dataset'])}: {one['method']} at {share}; least changed above, most changed below"
        figure.text(0.15 / width, top / height, title, fontsize=10.5, weight="bold", color=INK, va="top")
        top -= _HEAD
        for name in ("best", "worst"):
            for place, entry in enumerate(one[name]):
                _pair(figure, entry, tuple(one["grid"]), photos, 0.15 + 2 * place * (_SIDE + 0.06), top)
            top -= _SIDE + _TEXT
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def _pair(figure: Figure, entry: dict, grid: tuple[int, int], photos: bool, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    whole_HW3 = image_of(entry, grid) if photos and "jpeg" in entry else None
    for place, picture_HW3 in enumerate((whole_HW3, pruned_picture(whole_HW3, entry, grid))):
        if picture_HW3 is None:
            continue
        box = ((left + place * (_SIDE + 0.03)) / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height)
        axes = figure.add_axes(box)
        axes.imshow(picture_HW3)
        axes.set_axis_off()
    words = f"cosine {entry['cosine']:.3f}\n{entry['truth'][:18]} → {entry['answer'][:18]}"
    figure.text(left / width, (top - _SIDE - 0.04) / height, words, fontsize=7.5, color=SOFT, va="top")


def image_of(entry: dict, grid: tuple[int, int]) -> np.ndarray:
    """The image (H, W, 3) uint8, its sides whole numbers of patches."""
    image = Image.open(io.BytesIO(base64.b64decode(entry["jpeg"]))).convert("RGB")
    rows, columns = grid
    each = max(1, min(image.height // rows, image.width // columns))
    return np.asarray(image.resize((columns * each, rows * each), Image.Resampling.BICUBIC))


def pruned_picture(whole_HW3: np.ndarray | None, entry: dict, grid: tuple[int, int]) -> np.ndarray:
    """What is left after the last cut, (H, W, 3) uint8; without the image, only where the patches are."""
    kept_N = np.zeros(grid[0] * grid[1], dtype=bool)
    kept_N[entry["kept"][-1] if entry["kept"] else slice(None)] = True
    if whole_HW3 is None:
        whole_HW3 = np.broadcast_to(_GREY, (8 * grid[0], 8 * grid[1], 3))
    high, wide = whole_HW3.shape[0] // grid[0], whole_HW3.shape[1] // grid[1]
    kept_HW1 = kept_N.reshape(grid).repeat(high, 0).repeat(wide, 1)[..., None]
    return np.where(kept_HW1, whole_HW3, 0.86 * 255 + 0.14 * whole_HW3).astype(np.uint8)
