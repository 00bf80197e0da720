"""The picture of `python -m eval curve`: 1 - cosine above, milliseconds below, one column for each family."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from patchrank.search.pictures import FAINT, INK, SOFT

_COLOURS = ("#0f766e", "#1d4ed8", "#b45309", "#9f1239", "#6d28d9", "#475569")


def draw(rows: Sequence[dict], titles: Mapping[str, str]) -> bytes:
    """PNG; lines by budget. Without times only the upper row. Args: titles: curve -> what its x says."""
    timed = all(row["ms_batch16"] is not None for row in rows)
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    height = 2 if timed else 1
    figure = Figure(figsize=(4.6 * len(titles), 3.6 * height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes_YX = figure.subplots(height, len(titles), squeeze=False, sharex="col", sharey="row")
    for column, (curve, title) in enumerate(titles.items()):
        for budget, colour in zip(budgets, _COLOURS * len(budgets)):
            part = sorted((r for r in rows if (r["curve"], r["budget"]) == (curve, budget)), key=lambda r: r["x"])
            xs, label = [row["x"] for row in part], f"{100 * budget:g} % of the MACs"
            style = {"marker": "o", "markersize": 3.5, "linewidth": 1.2, "color": colour}
            axes_YX[0, column].plot(xs, [1 - row["feature_cosine"] for row in part], label=label, **style)
            low, high = ([1 - row["feature_cosine_ci95"][end] for row in part] for end in (0, 1))
            axes_YX[0, column].fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
            if timed:
                axes_YX[1, column].plot(xs, [row["ms_batch16"] for row in part], **style)
        axes_YX[-1, column].set_xlabel(title, fontsize=9, color=SOFT)
    if timed:
        for axes in axes_YX[1]:
            axes.axhline(rows[0]["dense_ms_batch16"], color=SOFT, linewidth=1, linestyle=(0, (4, 2)))
        axes_YX[1, 0].set_ylabel("ms, batch of 16; dashed: unpruned", fontsize=9, color=SOFT)
    axes_YX[0, 0].set_yscale("log")  # the row shares it
    axes_YX[0, 0].set_ylabel("1 - cosine to the unpruned feature", fontsize=9, color=SOFT)
    axes_YX[0, 0].legend(fontsize=8, frameon=False)
    fate = {"fold": "folded", "drop": "dropped"}[rows[0]["rest"]]
    axes_YX[0, 0].set_title(f"untrained, what is not kept is {fate}", fontsize=10, color=INK, loc="left")
    for axes in axes_YX.flat:
        _tidy(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _tidy(axes: Axes) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=9, colors=SOFT, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)
