"""Picture sheets of golden rankings: original, ranking, what stays at each keep ratio, deletion curve; PNG bytes.

Letters: H rows and W columns of pixels, C colours, N patches, M points of a curve.
"""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from patchrank.search.explain import Kept, Sheet

INK, SOFT, FAINT = "#1d2433", "#6b7280", "#d5d9e0"
GOLD, TEAL, GREY = "#c2570c", "#0f766e", "#9aa1ad"
RIGHT, WRONG = "#15803d", "#b91c1c"
RANKING = LinearSegmentedColormap.from_list(
    "ranking", ["#12153d", "#3b2a7a", "#8f2f7f", "#d9485f", "#fb9a5b", "#fdf2b0"]
)
_BLANK = np.array([0.955, 0.96, 0.97])


def score_map(order_N: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Importance per patch (rows, columns): 1 for the most important, 0 for the first to go."""
    score_N = np.empty(len(order_N))
    score_N[order_N] = np.linspace(1, 0, len(order_N))
    return score_N.reshape(grid)


def _per_pixel(value_grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Patch values -> pixels (H, W), one flat block per patch; pixels beyond the last whole patch join it."""
    rows, columns = value_grid.shape
    row_H = np.minimum(np.arange(size[0]) * rows // size[0], rows - 1)
    column_W = np.minimum(np.arange(size[1]) * columns // size[1], columns - 1)
    return value_grid[row_H][:, column_W]


def _grey(picture_HWC: np.ndarray) -> np.ndarray:
    return np.repeat((picture_HWC @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)


def heat_picture(sheet: Sheet) -> np.ndarray:
    """The ranking as colour over the picture's own light and shade, (H, W, C)."""
    colour_HWC = RANKING(_per_pixel(score_map(sheet.order_N, sheet.grid), sheet.picture_HWC.shape[:2]))[..., :3]
    return 0.72 * colour_HWC + 0.28 * _grey(sheet.picture_HWC)


def kept_picture(sheet: Sheet, num_kept: int) -> np.ndarray:
    """The picture with every patch that is not kept faded to a light grey, (H, W, C)."""
    is_kept_N = np.zeros(len(sheet.order_N), dtype=bool)
    is_kept_N[sheet.order_N[:num_kept]] = True
    is_kept_HW1 = _per_pixel(is_kept_N.reshape(sheet.grid), sheet.picture_HWC.shape[:2])[..., None]
    return np.where(is_kept_HW1, sheet.picture_HWC, 0.85 * _BLANK + 0.15 * _grey(sheet.picture_HWC))


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


def _show(axes: Axes, picture_HWC: np.ndarray, title: str, note: str = "", note_colour: str = SOFT) -> None:
    axes.imshow(picture_HWC, interpolation="lanczos" if min(picture_HWC.shape[:2]) < 64 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(FAINT)
    axes.set_title(title, fontsize=10.5, color=INK, pad=6)
    axes.text(0.5, -0.035, note, transform=axes.transAxes, ha="center", va="top", fontsize=9, color=note_colour)


def _verdict(kept: Kept) -> tuple[str, str]:
    """What the model says at this ratio, and its colour; the sign says it too, for eyes that see no red and green."""
    if kept.answer is None:
        return "", SOFT
    name = kept.answer if len(kept.answer) <= 26 else kept.answer[:25] + "…"
    if kept.is_right is None:
        return name, INK
    return (f"✓ {name}", RIGHT) if kept.is_right else (f"✗ {name}", WRONG)


def _show_kept(axes: Axes, sheet: Sheet, kept: Kept, title: str) -> None:
    verdict, colour = _verdict(kept)
    _show(axes, kept_picture(sheet, kept.num_kept), title, f"cosine {kept.cosine:.3f}")
    axes.text(0.5, -0.115, verdict, transform=axes.transAxes, ha="center", va="top", fontsize=9.5, color=colour)


def _colour_bar(figure: Figure, axes: Axes) -> None:
    bar_axes = axes.inset_axes((0.0, -0.085, 1.0, 0.035))
    bar = figure.colorbar(ScalarMappable(cmap=RANKING), cax=bar_axes, orientation="horizontal", ticks=[])
    bar.outline.set_visible(False)
    bar_axes.text(0, -0.9, "first to go", transform=bar_axes.transAxes, ha="left", va="top", fontsize=8.5, color=SOFT)
    bar_axes.text(
        1, -0.9, "stays longest", transform=bar_axes.transAxes, ha="right", va="top", fontsize=8.5, color=SOFT
    )


def _curve(axes: Axes, sheet: Sheet) -> None:
    keep_M, random_RM = sheet.curve_keep_M, sheet.random_RM
    axes.fill_between(keep_M, random_RM.min(0), random_RM.max(0), color=GREY, alpha=0.25, linewidth=0)
    axes.plot(keep_M, random_RM.mean(0), color=GREY, linewidth=1.5, label=f"random ({len(random_RM)} draws)")
    axes.plot(keep_M, sheet.checkerboard_M, color=TEAL, linewidth=1.5, linestyle=(0, (4, 2)), label="checkerboard")
    axes.plot(keep_M, sheet.golden_M, color=GOLD, linewidth=2.4, label="this ranking")
    axes.plot([kept.keep for kept in sheet.kept], [kept.cosine for kept in sheet.kept], "o", color=GOLD, markersize=5.5)
    axes.set_xlim(1.0, keep_M.min())
    lowest = min(random_RM.min(), sheet.checkerboard_M.min(), sheet.golden_M.min())
    axes.set_ylim(lowest - 0.06 * (1 - lowest), 1 + 0.04 * (1 - lowest))
    axes.set_xticks([1.0, 0.8, 0.6, 0.4, 0.2])
    axes.set_xlabel("share of patches kept", fontsize=9, color=SOFT)
    axes.set_title(f"cosine to the unpruned feature ({sheet.rest})", fontsize=10.5, color=INK, pad=6)
    axes.tick_params(labelsize=8.5, colors=SOFT, length=0)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower left", fontsize=8.5, frameon=False, labelcolor=INK)


def _heading(sheet: Sheet) -> str:
    parts = [] if sheet.truth is None else [f"true: {sheet.truth}"]
    parts += [] if sheet.dense.answer is None else [f"unpruned model says: {sheet.dense.answer}"]
    return "     ".join(_short(part) for part in parts)


def _png(figure: Figure, dpi: int) -> bytes:
    """PNG without date or version, so that the same sheet gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def draw_sheet(sheet: Sheet) -> bytes:
    """One image on one sheet."""
    num_pictures = 2 + len(sheet.kept)
    height, width = sheet.picture_HWC.shape[:2]
    side, curve, gap, edge = 2.35, 3.5, 0.22, 0.3
    picture_width = side * width / height
    total_width = 2 * edge + num_pictures * (picture_width + gap) + 0.5 + curve
    total_height = side + 1.55
    figure = Figure(figsize=(total_width, total_height))
    FigureCanvasAgg(figure)
    bottom = 0.62 / total_height

    def place(left: float, wide: float) -> Axes:
        return figure.add_axes((left / total_width, bottom, wide / total_width, side / total_height))

    axes = [place(edge + index * (picture_width + gap), picture_width) for index in range(num_pictures)]
    _show(axes[0], sheet.picture_HWC, "what the model sees")
    _show(axes[1], heat_picture(sheet), "golden ranking")
    _colour_bar(figure, axes[1])
    for place_of, kept in zip(axes[2:], sheet.kept, strict=True):
        _show_kept(place_of, sheet, kept, f"keep {kept.keep:g}  ({kept.num_kept} of {len(sheet.order_N)})")
    _curve(place(total_width - edge - curve, curve), sheet)
    top = 1 - 0.2 / total_height
    figure.text(edge / total_width, top, _short(sheet.image_id), fontsize=13, weight="bold", color=INK, va="top")
    figure.text(1 - edge / total_width, top, _heading(sheet), fontsize=11, color=INK, va="top", ha="right")
    return _png(figure, 110)


def draw_overview(sheets: list[Sheet], title: str, limit: int = 24) -> bytes:
    """Contact sheet: one line per image (the first `limit`), two lines side by side from nine images on."""
    sheets = sheets[:limit]
    num_pictures = 2 + len(sheets[0].kept)
    num_columns = 1 if len(sheets) <= 8 else 2
    num_rows = -(-len(sheets) // num_columns)
    height, width = sheets[0].picture_HWC.shape[:2]
    side, gap, edge, lane, head = 1.25, 0.08, 0.3, 0.5, 0.82
    picture_width = side * width / height
    strip = num_pictures * (picture_width + gap) - gap
    total_width = 2 * edge + num_columns * strip + (num_columns - 1) * lane
    total_height = head + num_rows * (side + 0.36) + edge - 0.1
    figure = Figure(figsize=(total_width, total_height))
    FigureCanvasAgg(figure)
    figure.text(edge / total_width, 1 - 0.2 / total_height, title, fontsize=13, weight="bold", color=INK, va="top")
    for index, sheet in enumerate(sheets):
        column, row = index // num_rows, index % num_rows
        top = total_height - head - row * (side + 0.36)
        left = edge + column * (strip + lane)
        pictures = [
            sheet.picture_HWC,
            heat_picture(sheet),
            *(kept_picture(sheet, kept.num_kept) for kept in sheet.kept),
        ]
        names = ["image", "ranking", *(f"keep {kept.keep:g}" for kept in sheet.kept)]
        truth = "" if sheet.truth is None else f"true: {sheet.truth}"
        verdicts = [(truth, INK), _verdict(sheet.dense), *(_verdict(kept) for kept in sheet.kept)]
        for place, (picture_HWC, name, (verdict, colour)) in enumerate(zip(pictures, names, verdicts, strict=True)):
            box = (left + place * (picture_width + gap), top - side, picture_width, side)
            scale = (total_width, total_height, total_width, total_height)
            axes = figure.add_axes(tuple(value / whole for value, whole in zip(box, scale, strict=True)))
            _show(axes, picture_HWC, name if row == 0 else "")
            axes.title.set_fontsize(9)
            short = verdict if len(verdict) <= 22 else verdict[:21] + "…"
            axes.text(0.5, -0.05, short, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=colour)
    return _png(figure, 110)
