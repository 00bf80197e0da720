"""One look for every figure of the report: a colour, a marker and a name per method, the same in all panels."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from eval.records import DENSE

INK, SOFT, FAINT, PAPER = "#1d2433", "#5b6472", "#dfe3e9", "#ffffff"
BACKDROP = "#a9b1bd"
"""Methods that are there for completeness."""


@dataclass(frozen=True)
class Look:
    """How one method is drawn."""

    colour: str
    marker: str
    line: tuple | str = "-"
    width: float = 1.4
    depth: int = 4
    """Higher is drawn later; markers lie just above their line."""

    @property
    def size(self) -> float:
        """Of its markers."""
        return {"*": 11.0, ".": 6.0}.get(self.marker, 4.6 + 1.15 * self.width)


_LOOKS = {
    "ours": Look("#c2410c", "o", "-", 2.6, 7),
    "golden": Look("#a16207", "*", (0, (1, 1.6))),
    "tome": Look("#1d4ed8", "s"),
    "dtem": Look("#0891b2", "D", (0, (4, 2))),
    "pitome": Look("#4f46e5", "p", (0, (4, 2))),
    "mlerp": Look("#7c3aed", "h"),
    "tofu": Look("#a855f7", "8", (0, (4, 2))),
    "evit": Look("#15803d", "^"),
    "visionzip": Look("#0d9488", "v", (0, (4, 2))),
    "diffrate": Look("#65a30d", "X", (0, (4, 2))),
    "a-vit": Look("#9d174d", "P", (0, (4, 2))),
    "low-resolution": Look("#be185d", "d", (0, (4, 2))),
    "shallow": Look("#6b21a8", "<", (0, (4, 2))),
    "class-attention": Look("#4d7c0f", ">", (0, (2, 2))),
    "random": Look("#64748b", "x", (0, (2, 2))),
}
"""Family -> look; a method belongs to the first family whose name it holds."""
_VARIANT_LINES = ("-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_SPARE = Look("#0e7490", "H")
"""A strong method without a family."""
_PLAIN = Look(BACKDROP, ".", (0, (1, 2)), 0.8, 2)


def family_of(method: str) -> str | None:
    """The family of a method's name; None for one without a colour of its own."""
    for family in _LOOKS:
        if method == family or method.startswith(f"{family}-") or method.endswith(f"-{family}"):
            return family
    return None


def looks_of(
    methods: Sequence[str], strongest: Collection[str] = (), shown: Collection[str] | None = None
) -> dict[str, Look]:
    """A look for each method: members of a family share its colour and differ by line, the first one drawn solid.

    Args: strongest: methods drawn a little thicker, whatever their family; shown: those that get a colour beside them
    (None: all that have a family), so that a figure of thirty methods stays readable.
    """
    seen: dict[str, int] = {}
    looks = {}
    for method in methods:
        family = family_of(method)
        if method not in strongest and (family is None or (shown is not None and method not in shown)):
            looks[method] = _PLAIN
            continue
        look = _LOOKS.get(family, _SPARE)
        place = seen.get(family or method, 0)
        seen[family or method] = place + 1
        if place:
            look = replace(look, line=_VARIANT_LINES[place % len(_VARIANT_LINES)], width=min(look.width, 1.6), depth=5)
        looks[method] = replace(look, width=max(look.width, 2.1), depth=6) if method in strongest else look
    return looks


def label_of(method: str) -> str:
    """Name of a method in a legend."""
    return "unpruned" if method == DENSE else method


def dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Quiet axes: a faint grid, no frame, every axis with its unit."""
    axes.set_title(title, fontsize=11.5, color=INK, loc="left", pad=9, weight="bold")
    axes.set_xlabel(x_label, fontsize=9.5, color=SOFT)
    axes.set_ylabel(y_label, fontsize=9.5, color=SOFT)
    axes.tick_params(labelsize=9, colors=SOFT, length=0)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(FAINT)


def plain(value: float, _=None) -> str:
    """A tick without needless zeros."""
    return f"{value:g}"


PLAIN_TICKS = FuncFormatter(plain)
