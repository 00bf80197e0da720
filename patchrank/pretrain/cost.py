"""What a recipe costs before it runs: multiply-accumulates of a picture with its caption, and tokens, in closed form.

    step = 3 x (passes that are trained) + 1 x (passes that are not), as a backward pass is two forward passes

Counted are all matrix products of towers, heads, decoders, maskers and folds; elementwise work, norms and the
contrastive logits are not. Texts count at full context. 1 MAC = 2 FLOP.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from patchrank.macs import block_macs, cut_macs, embed_macs, finish_macs, head_macs
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.maskers import MASKERS, MaskSpec
from patchrank.pretrain.masking.anchors import num_anchors
from patchrank.pretrain.masking.cluster import ClusterMasker
from patchrank.pretrain.masking.pgs import PgsMasker
from patchrank.pretrain.recipes import RECIPES, Recipe
from patchrank.spec import PruneSpec
from patchrank.text import VOCABULARY, TextConfig
from patchrank.tower import TowerConfig

_DISTILL_KEEP, _DISTILL_LAYERS, _MLM_LAYERS = 0.25, 1, 4
"""What `DistillObjective` and `MlmObjective` do unless told otherwise."""


class Macs(NamedTuple):
    """Multiply-accumulates of forward passes for one picture and its caption."""

    trained: int = 0
    frozen: int = 0

    def plus(self, other: "Macs") -> "Macs":
        """Both together."""
        return Macs(self.trained + other.trained, self.frozen + other.frozen)

    @property
    def step(self) -> int:
        """Of a training step."""
        return 3 * self.trained + self.frozen


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One line of the cost table."""

    recipe: str
    image_tokens: int
    """Tokens of a picture that enter block 0 of the image tower in training, all views together."""
    teacher_tokens: int
    """Tokens that the teacher reads."""
    macs: int
    """Multiply-accumulates of a step for one picture and its caption."""
    macs_ratio: float
    """Against plain CLIP with the same towers."""
    reported_time_ratio: float | None
    """Training time against plain CLIP as the paper reports it."""


def text_macs(config: TextConfig) -> int:
    """Text tower on a full context."""
    blocks = config.num_layers * _text_block(config)
    return blocks + config.width * config.output_dim


def _text_block(config: TextConfig) -> int:
    tower = TowerConfig(image_size=(1, 1), patch_size=1, width=config.width, num_layers=1, num_heads=config.num_heads,
                        mlp_width=config.mlp_width)  # fmt: skip
    return block_macs(tower, config.context)


def view_macs(tower: TowerConfig, spec: MaskSpec) -> Macs:
    """One trained view: embedding, masker, fold, blocks, projection."""
    N, K = tower.num_patches, spec.num_kept(tower.grid)
    macs = Macs(trained=embed_macs(tower) + finish_macs(tower, tower.num_prefix + K, 0))
    if spec.keep >= 1.0 and spec.least is None:
        return macs
    macs = macs.plus(Macs(frozen=_masker_macs(tower, spec)))
    if spec.rest == "fold":
        prune = PruneSpec(cuts=((0, 1.0),), rest="fold")
        whole = cut_macs(tower, prune, tower.num_prefix + N, N, K)
        average = (N - K) * K * (tower.width + 1)
        macs = macs.plus(Macs(trained=average, frozen=whole - average))
    return macs


def _masker_macs(tower: TowerConfig, spec: MaskSpec) -> int:
    """Similarities between patches; the teacher's pass is counted apart."""
    masker, N = MASKERS[spec.masker], tower.num_patches
    pixels = 3 * tower.patch_size**2 + 1 + (tower.width if "tokens" in masker.needs else 0)
    if isinstance(masker, PgsMasker) and masker.transport:
        return N * N * pixels
    if isinstance(masker, (PgsMasker, ClusterMasker)):
        share = masker.candidates if isinstance(masker, PgsMasker) else masker.share
        return N * num_anchors(share, N) * pixels
    return 0


def teacher_macs(tower: TowerConfig, shrink: int, patches: bool) -> tuple[int, int]:
    """The teacher's pass over a picture at 1 / shrink of the side: MACs, tokens."""
    side = tuple(size // shrink for size in tower.image_size)
    small = replace(tower, image_size=side)
    tokens = small.num_prefix + small.num_patches
    rows = small.num_layers * (3 * tower.width**2 + tokens * tower.width)
    if patches:
        macs = small.num_layers * block_macs(small, tokens) + head_macs(small, tokens)
    else:
        # the last block's keys are computed once more for its class row
        macs = finish_macs(small, tokens, 0) + tokens * tower.width**2
    return embed_macs(small) + macs + rows, tokens


def _term_macs(name: str, config: PretrainConfig, num_views: int) -> Macs:
    """Heads and passes of one objective."""
    width, hidden, out = config.width, config.head_width, config.head_out
    tower, text = config.tower_config(), config.text_config()
    if name == "simclr":
        return Macs(trained=2 * (width * hidden + hidden * hidden + hidden * out))
    if name == "byol":
        projector, predictor = width * hidden + hidden * out, 2 * hidden * out
        return Macs(trained=num_views * (projector + predictor), frozen=projector)
    if name == "distill":
        kept = MaskSpec(keep=_DISTILL_KEEP).num_kept(tower.grid) + tower.num_prefix
        tokens, codes = tower.num_prefix + tower.num_patches, tower.num_patches * width * hidden
        student = embed_macs(tower) + tower.num_layers * block_macs(tower, kept)
        return Macs(trained=student + _DISTILL_LAYERS * block_macs(tower, tokens) + codes, frozen=codes)
    if name == "mlm":
        blocks = (text.num_layers + _MLM_LAYERS) * _text_block(text)
        return Macs(trained=blocks + text.context * text.width * VOCABULARY)
    return Macs()


def recipe_macs(config: PretrainConfig, recipe: Recipe) -> Macs:
    """One picture and its caption through all that a recipe does in its main part."""
    tower, text = config.tower_config(), config.text_config()
    total = Macs(trained=text_macs(text))
    if recipe.locked:
        return total.plus(Macs(frozen=view_macs(tower, MaskSpec()).trained))
    for view in recipe.views:
        total = total.plus(view_macs(tower, view.mask))
    num_views = sum(view.meets_views for view in recipe.views)
    for name in recipe.terms:
        total = total.plus(_term_macs(name, config, num_views))
    if recipe.teacher is not None:
        total = total.plus(Macs(frozen=teacher_macs(tower, recipe.teacher.shrink, "distill" in recipe.terms)[0]))
    return total


def run_macs(config: PretrainConfig, until: int | None = None) -> int:
    """All steps of a run (cheap start, main part and unmasked tuning), or the first `until` of them."""
    recipe, num = config.row, config.num_steps
    steps = range(num if until is None else until)
    phases = Counter(recipe.views_at(step, num, config.cheap_start, config.cheap_keep, config.tuning) for step in steps)
    each = {views: recipe_macs(config, replace(recipe, views=views)).step for views in phases}
    return config.batch_size * sum(count * each[views] for views, count in phases.items())


def num_tokens(config: PretrainConfig, recipe: Recipe) -> int:
    """Tokens of a picture that enter block 0 in trained passes."""
    tower = config.tower_config()
    if recipe.locked:
        return 0
    kept = [view.mask.num_kept(tower.grid) for view in recipe.views]
    kept += [MaskSpec(keep=_DISTILL_KEEP).num_kept(tower.grid)] if "distill" in recipe.terms else []
    return sum(tower.num_prefix + num for num in kept)


def cost_table(config: PretrainConfig) -> list[CostRow]:
    """All recipes with the towers of one config, its own with the masks and losses that the config asks for."""
    plain = recipe_macs(config, RECIPES["clip"]).step
    rows = []
    for name, recipe in (RECIPES | {config.recipe: config.row}).items():
        macs, teacher = recipe_macs(config, recipe).step, recipe.teacher
        rows.append(
            CostRow(
                recipe=name,
                image_tokens=num_tokens(config, recipe),
                teacher_tokens=teacher_macs(config.tower_config(), teacher.shrink, False)[1] if teacher else 0,
                macs=macs,
                macs_ratio=macs / plain,
                reported_time_ratio=recipe.reported_time,
            )
        )
    return rows


def as_lines(rows: list[CostRow], chosen: str) -> list[str]:
    """The table for a terminal, the chosen recipe marked."""
    head = f"  {'recipe':14} {'tokens':>7} {'teacher':>8} {'GMAC/pair':>10} {'x CLIP':>7} {'reported time':>14}"
    lines = [head]
    for row in rows:
        reported = "-" if row.reported_time_ratio is None else f"{row.reported_time_ratio:.2f}"
        mark = ">" if row.recipe == chosen else " "
        lines.append(
            f"{mark} {row.recipe:14} {row.image_tokens:7} {row.teacher_tokens:8} {row.macs / 1e9:10.3f} "
            f"{row.macs_ratio:7.2f} {reported:>14}"
        )
    return lines
