"""PruneSpec: a pruned tower as plain data: where it cuts, how many patches stay, what becomes of the rest."""

from dataclasses import asdict, dataclass, replace

from patchrank.errors import UserError
from patchrank.tokens import num_keep

RESTS = ("fold", "drop")
SELECTS = ("suppress", "cover", "topk")
"""`cover` and `suppress` compare the patches with each other, `topk` does not."""
MERGE_NORMS = ("preserve", "mean")
WHERES = ("before", "inside")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}: unknown; choose one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """Cuts and their manner; frozen, comparable, JSON-able.

    Args: cuts ((layer, keep), ...) with layers rising and `keep` in (0, 1] relative to all N patches, falling or equal;
    where "before" block `layer` or "inside" it, between attention and MLP; rest "fold" or "drop"; select "topk" (the
    best scores), "suppress" (scores are priorities of a covering selection) or "cover" (scores are log importances of
    one that weighs likeness by them); merge_norm "preserve" or "mean";
    num_added compensation tokens that join at the first cut; size_bias whether attention in the blocks counts a merged
    token as often as it has patches (pooling always does).
    Raises: UserError for a value outside its rule.
    """

    cuts: tuple[tuple[int, float], ...]
    where: str = "before"
    rest: str = "fold"
    select: str = "topk"
    merge_norm: str = "preserve"
    num_added: int = 0
    size_bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "cuts", tuple((int(layer), float(keep)) for layer, keep in self.cuts))
        _one_of("where", self.where, WHERES)
        _one_of("rest", self.rest, RESTS)
        _one_of("select", self.select, SELECTS)
        _one_of("merge_norm", self.merge_norm, MERGE_NORMS)
        previous_layer, previous_keep = -1, 1.0
        for layer, keep in self.cuts:
            if not 0.0 < keep <= 1.0:
                raise UserError(f"keep={keep:g}: must lie in (0, 1]; 0.6 keeps 60 % of the patches")
            if layer <= previous_layer:
                raise UserError(
                    f"cuts at layers {previous_layer} and {layer}: layers must rise from 0; reorder the cuts"
                )
            if keep > previous_keep:
                raise UserError(f"keep={keep:g} at layer {layer}: cannot exceed the {previous_keep:g} left before it")
            previous_layer, previous_keep = layer, keep
        if self.num_added < 0:
            raise UserError(f"num_added={self.num_added}: must be 0 or more")

    @property
    def covers(self) -> bool:
        """Whether the selection compares the patches with each other."""
        return self.select != "topk"

    def check_layers(self, num_layers: int) -> None:
        """Raise UserError if a cut lies outside a tower of `num_layers` blocks."""
        for layer, _ in self.cuts:
            if layer >= num_layers:
                raise UserError(f"layer={layer}: outside this tower of {num_layers} blocks; use 0 to {num_layers - 1}")

    def counts(self, num_patches: int) -> list[tuple[int, int]]:
        """[(layer, K), ...] for a tower of `num_patches` patches."""
        return [(layer, num_keep(keep, num_patches)) for layer, keep in self.cuts]

    def to_dict(self) -> dict:
        """JSON-able form; `PruneSpec.from_dict` gives the same spec back."""
        return asdict(self) | {"cuts": [list(cut) for cut in self.cuts]}

    @classmethod
    def from_dict(cls, value: dict) -> "PruneSpec":
        """Inverse of `to_dict`."""
        return cls(**value)

    def with_keep(self, keep: float) -> "PruneSpec":
        """The same one-cut spec at another keep ratio. Raises: ValueError for several cuts."""
        if len(self.cuts) != 1:
            raise ValueError("with_keep: only a spec with one cut has one keep ratio")
        return replace(self, cuts=((self.cuts[0][0], keep),))


def parse_cuts(text: str, num_patches: int) -> tuple[tuple[int, float], ...]:
    """'3:156,5:0.7' (layer:count or layer:ratio) -> ((3, 156 / N), (5, 0.7)).

    Raises: UserError for text of another form or a count outside 1 .. num_patches.
    """
    cuts = []
    for part in text.split(","):
        layer, _, amount = part.partition(":")
        try:
            value = float(amount) if "." in amount else int(amount)
            cut_layer = int(layer)
        except ValueError:
            raise UserError(f"--cuts {text}: {part!r} is not layer:count or layer:ratio; write 3:156,5:136") from None
        if isinstance(value, int) and not 1 <= value <= num_patches:
            raise UserError(f"--cuts {text}: count {value} is outside 1 to {num_patches}, the patches of this tower")
        cuts.append((cut_layer, value / num_patches if isinstance(value, int) else value))
    return tuple(cuts)
