"""Pictures of kept patches as SVG: the image, and the image with every patch that left faded."""

from collections.abc import Sequence
from html import escape

from eval.report_data import title_of

_SIDE = 160


def faded(kept: Sequence[int], grid: tuple[int, int]) -> str:
    """SVG path over all patches that are not in `kept`, in a square of _SIDE."""
    rows, columns = grid
    high, wide = _SIDE / rows, _SIDE / columns
    stay = set(kept)
    squares = [
        f"M{column * wide:.2f} {row * high:.2f}h{wide:.2f}v{high:.2f}h-{wide:.2f}z"
        for row in range(rows)
        for column in range(columns)
        if row * columns + column not in stay
    ]
    return "".join(squares)


def photo(entry: dict) -> str:
    """SVG of the image itself."""
    name = escape(entry["id"], quote=True)
    return (
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{name}"><title>{name}</title>{_image(entry)}</svg>'
    )


def _image(entry: dict) -> str:
    return (
        f'<image href="data:image/jpeg;base64,{entry["jpeg"]}" width="{_SIDE}" height="{_SIDE}" '
        'preserveAspectRatio="none"/>'
    )


def kept_patches(entry: dict, grid: tuple[int, int], with_photo: bool) -> str:
    """SVG of what is left after the last cut; without the photo, only where the patches are."""
    kept = entry["kept"][-1] if entry["kept"] else list(range(grid[0] * grid[1]))
    name = escape(f"{entry['id']}: {len(kept)} of {grid[0] * grid[1]} patches kept", quote=True)
    below = _image(entry) if with_photo else f'<rect width="{_SIDE}" height="{_SIDE}" fill="#64748b"/>'
    return (
        f'<svg class="keptpatches" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{name}"><title>{name}</title>'
        f'{below}<path d="{faded(kept, grid)}" fill="#ffffff" fill-opacity="0.86"/></svg>'
    )


def caption(entry: dict) -> str:
    """What it is, and what the unpruned and the pruned tower say."""
    same = entry["answer"] == entry["dense_answer"]
    said = f"both say {entry['answer']}" if same else f"{entry['dense_answer']} → {entry['answer']}"
    return f"{entry['truth']}: {said}"


def sheets_of(pictures: dict, with_photo: bool) -> list[dict]:
    """What the page shows of each data set; pictures that the project draws itself are always shown."""
    return [_sheet(one, with_photo) for one in pictures.get("sheets", [])]


def _sheet(one: dict, with_photo: bool) -> dict:
    with_photo = with_photo or one.get("drawn", False)
    grid = tuple(one["grid"])
    layers = ", ".join(map(str, one["layers"]))
    total = grid[0] * grid[1]
    left = len(one["best"][0]["kept"][-1]) if one["best"] and one["best"][0]["kept"] else total
    groups = [("best", "least changed"), ("worst", "most changed")]
    return {
        "title": f"{title_of(one['dataset'])}: {one['method']} at {100 * one['macs']:g} % of the MACs, "
        f"{left} of {total} patches after cuts in blocks {layers}",
        "groups": [
            {
                "title": f"The images whose feature is {words}",
                "entries": [_entry(entry, grid, with_photo) for entry in one[name]],
            }
            for name, words in groups
        ],
    }


def _entry(entry: dict, grid: tuple[int, int], with_photo: bool) -> dict:
    with_photo = with_photo and "jpeg" in entry
    pair = ([photo(entry)] if with_photo else []) + [kept_patches(entry, grid, with_photo)]
    return {"svgs": pair, "cosine": f"{entry['cosine']:.3f}", "caption": caption(entry)}
