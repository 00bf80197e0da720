"""What a pretraining run can be told: the only home of its help texts; `rules.py` has the rules of its values.

A flag that is not given takes the recipe's value (`patchrank.pretrain.settings`): every value of a made config is
concrete. Without any flag that is the recipe of the embedded model.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from patchrank.preprocess import Preprocess
from patchrank.pretrain.maskers import MaskSpec
from patchrank.pretrain.recipes import RECIPES, Recipe
from patchrank.pretrain.settings import Setting, setting_of, told_default
from patchrank.text import TextConfig
from patchrank.tower import TowerConfig

_FREE = ("out", "data_root", "name", "device", "eval_every", "save_every", "workers", "tensorboard", "eval_data",
         "eval_split", "log_every", "cache")  # fmt: skip
"""Flags that may change when a run is taken up again."""


def weight_of(said: str) -> tuple[str, float]:
    """("simclr", 0.5) of "simclr=0.5". Raises: ValueError."""
    name, _, value = said.partition("=")
    return name, float(value)


def _by_setting(name: str) -> Any:
    return tyro.conf.arg(help_behavior_hint=told_default(name))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train an image tower and a text tower on pictures with captions.

    Flags whose default is None take the value of the recipe's setting (patchrank/pretrain/settings.py).
    """

    recipe: str = "clip"
    """Row of RECIPES: clip, flip50, flip75, flip50_fold, slip, maskclip, maskclip_mlm, rand1x50, rand2x50, att1x50,
    att2x50, att2x50_high, aclip, aclip_eff, aclip_fast, eclip, pgs-0.3, pgs-0.5, or lit."""
    masker: str | None = None
    """Masker in place of the recipe's, for ablations: a row of MASKERS such as text or pgs-no-edges."""
    threshold: float | None = None
    """Recipe eclip: patches fall that are more alike (cosine) to an anchor than this; without it, the value that keeps
    half of the patches on average is searched for before the first step."""
    least: float | None = None
    """A count for each picture in place of one for all: it keeps at least this share of its patches, at most as much
    above the recipe's share, which stays the mean (a threshold is searched for); padding is blocked as a key."""
    contrast: str = "clip"
    """Contrastive loss: clip, or siglip in its place."""
    weights: tuple[str, ...] = ()
    """Other weights of the recipe's losses, for ablations: --weights simclr=0 byol=1; 0 leaves a loss out, but the
    contrastive one ("clip") stays."""
    gather_grad: bool | None = None
    """Whether gradients flow through the gather of the contrastive loss on several processes; without it the recipe's:
    all but slip, whose released code (and the papers' plain CLIP with it) stops them."""
    setting: str = "small"
    """Where the values of the flags below come from that are not given: "small" (two cores) or "paper"."""
    data: str = "digits"
    """Pictures with captions: a data set of the catalog (captions, or classes in templates; of these also half the
    classes, as caltech101/even), several joined by +, "captions" (your own folder), or "shards" (WebDataset)."""
    data_root: Path | None = None
    """Folder that holds the data sets, your own folder, or the shards (a folder of *.tar, or data/{000..099}.tar);
    without it $PATCHRANK_ASSETS/data."""
    out: Path = Path("out/pretrain")
    """Folder of the run: its state, its log and in the end the model; the same command goes on after a kill."""
    name: str | None = None
    """Name that the saved model answers with; without it <recipe>-<data>."""
    model: str = "embedded"
    """Recipe lit: the checkpoint whose image tower is locked, as in `load_clip`."""
    pretrained: str = ""
    """Recipe lit: weights of --model."""
    cache: Path | None = None
    """Recipe lit: folder of the locked tower's features, which runs may share; without it <out>/features."""
    seed: int = 0
    """Seed of weights, batches, captions, crops and masks."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    threads: int = 2
    """CPU threads; another number gives slightly other weights."""
    workers: int = 0
    """Threads that decode and crop pictures of the next batch beside the training; they change no result."""
    precision: Annotated[str | None, _by_setting("precision")] = None
    """float32, or bfloat16 (autocast; weights, losses and averages stay float32)."""
    num_steps: Annotated[int | None, _by_setting("num_steps")] = None
    """Steps of the optimiser in the whole run."""
    batch_size: Annotated[int | None, _by_setting("batch_size")] = None
    """Pictures of a step, all processes together; each comes with one of its captions, drawn anew."""
    accumulate: int = 1
    """Parts that a process computes its share of a batch in; negatives and batch norms come from one part at a time."""
    lr: Annotated[float | None, _by_setting("lr")] = None
    """Peak learning rate."""
    lr_end: Annotated[float | None, _by_setting("lr_end")] = None
    """Learning rate after the last step."""
    num_warmup: Annotated[int | None, _by_setting("num_warmup")] = None
    """Steps until the peak."""
    decay: Annotated[float | None, _by_setting("decay")] = None
    """Share of the steps, the last ones, in which the learning rate falls."""
    weight_decay: Annotated[float | None, _by_setting("weight_decay")] = None
    """Decay of the matrices; biases, norms, positions and the patch embedding have none."""
    beta2: Annotated[float | None, _by_setting("beta2")] = None
    """Second moment of AdamW; the first is 0.9."""
    epsilon: Annotated[float | None, _by_setting("epsilon")] = None
    """Epsilon of AdamW."""
    max_norm: Annotated[float | None, _by_setting("max_norm")] = None
    """Limit of the gradient's norm; 0 switches it off."""
    tuning: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: the recipe's)")] = None
    """Share of the steps, the last ones, that mask nothing (unmasked tuning)."""
    curriculum: Annotated[float | None, _by_setting("curriculum")] = None
    """Share of the steps, the first ones, in which digits may be easier than they are; 0 switches it off."""
    cheap_start: Annotated[float | None, _by_setting("cheap_start")] = None
    """Share of the steps, the first ones, that see only the patches of most contrast; 0 follows the recipe at once."""
    cheap_keep: Annotated[float | None, _by_setting("cheap_keep")] = None
    """Share of the patches seen during the cheap start."""
    least_area: Annotated[float | None, _by_setting("least_area")] = None
    """Crops cover at least this share of a picture; 1 takes single views whole, moved by up to --shift pixels."""
    shift: Annotated[int | None, _by_setting("shift")] = None
    """Whole pictures move by up to so many pixels."""
    image_size: Annotated[int | None, _by_setting("image_size")] = None
    """Side of the pictures in pixels."""
    patch_size: Annotated[int | None, _by_setting("patch_size")] = None
    """Side of a patch in pixels."""
    width: Annotated[int | None, _by_setting("width")] = None
    """Width of the image tower."""
    num_layers: Annotated[int | None, _by_setting("num_layers")] = None
    """Blocks of the image tower."""
    num_heads: Annotated[int | None, _by_setting("num_heads")] = None
    """Heads of the image tower."""
    feature_dim: Annotated[int | None, _by_setting("feature_dim")] = None
    """Dimension of the shared features."""
    text_width: Annotated[int | None, _by_setting("text_width")] = None
    """Width of the text tower."""
    text_head: Annotated[int | None, _by_setting("text_head")] = None
    """Width of a head of the text tower."""
    text_layers: Annotated[int | None, _by_setting("text_layers")] = None
    """Blocks of the text tower."""
    context: Annotated[int | None, _by_setting("context")] = None
    """Tokens of a text, start and end included: bytes, or pieces of words with --num-merges."""
    num_merges: Annotated[int | None, _by_setting("num_merges")] = None
    """Recipe lit: texts are read as pieces of words, by so many merges of CLIP's vocabulary; 0: as bytes."""
    text_pool: Annotated[str | None, _by_setting("text_pool")] = None
    """Recipe lit: what a text's feature is made of: its "end" token, or the "mean" over all tokens."""
    word_drop: Annotated[float | None, _by_setting("word_drop")] = None
    """Share of a caption's tokens that the text tower does not see in training, drawn anew each time."""
    frozen_patches: Annotated[bool | None, _by_setting("frozen_patches")] = None
    """Whether the patch embedding stays at its random start."""
    start: Annotated[str | None, _by_setting("start")] = None
    """How the image tower starts: "usual", or "local" (every head looks at a neighbour)."""
    head_width: Annotated[int | None, _by_setting("head_width")] = None
    """Hidden width of the SimCLR and BYOL heads."""
    head_out: Annotated[int | None, _by_setting("head_out")] = None
    """Output width of these heads."""
    eval_data: str | None = None
    """Data sets of the checks, joined by +; without it those of --data."""
    eval_split: str = "val"
    """Split of the checks; a data set without it is not checked."""
    eval_every: int = 500
    """Steps between checks: zero-shot accuracy and retrieval."""
    save_every: int = 250
    """Steps between states on disk: what a kill can cost."""
    log_every: int = 10
    """Steps between rows of log.jsonl and of TensorBoard."""
    tensorboard: bool = False
    """Also write TensorBoard's event files into --out."""
    dry_run: bool = False
    """Print the cost table and draw what the masks keep of 16 pictures, then stop."""

    def __post_init__(self) -> None:
        recipe = RECIPES.get(self.recipe)
        if recipe is None or self.setting not in ("small", "paper"):
            return  # `check` says so
        setting = setting_of(self.setting, self.recipe, recipe.paper, recipe.small, self.data)
        values = {field.name: getattr(setting, field.name) for field in fields(Setting)} | {"tuning": recipe.tuning}
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def settings(self) -> dict[str, Any]:
        """What must not change within a run, as JSON values."""
        values = {name: value for name, value in asdict(self).items() if name not in (*_FREE, "dry_run")}
        return values | {"weights": list(self.weights)}

    @property
    def row(self) -> Recipe:
        """The recipe with --masker, --threshold and --contrast in place."""
        recipe = RECIPES[self.recipe]
        views = tuple(replace(view, mask=self._mask(view.mask)) for view in recipe.views)
        weights = recipe.terms | dict(map(weight_of, self.weights))
        terms = {self.contrast if name == "clip" else name: weight for name, weight in weights.items() if weight}
        gather_grad = recipe.gather_grad if self.gather_grad is None else self.gather_grad
        return replace(recipe, views=views, terms=terms, gather_grad=gather_grad)

    def _mask(self, spec: MaskSpec) -> MaskSpec:
        if self.masker not in (None, spec.masker) and spec.keep < 1.0:
            # a threshold belongs to the scores of one masker; another keeps the same share of every picture
            fixed = {} if spec.mean_keep is None else dict(keep=spec.mean_keep, least=None, mean_keep=None)
            spec = replace(spec, masker=self.masker, **fixed)
        if self.least is not None and spec.keep < 1.0:
            mean = spec.mean_keep or spec.keep
            spec = replace(spec, least=self.least, keep=min(1.0, 2 * mean - self.least), mean_keep=mean)
        if self.threshold is not None and spec.mean_keep is not None:
            return replace(spec, threshold=-self.threshold, mean_keep=None)
        return spec

    def tower_config(self) -> TowerConfig:
        """The image tower: class token, ViT."""
        return TowerConfig(
            image_size=(self.image_size, self.image_size),
            patch_size=self.patch_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_width=4 * self.width,
            output_dim=self.feature_dim,
        )

    def text_config(self, output_dim: int | None = None) -> TextConfig:
        """The text tower; `output_dim` where a locked image tower fixes the features."""
        return TextConfig(
            context=self.context,
            width=self.text_width,
            num_layers=self.text_layers,
            num_heads=self.text_width // self.text_head,
            mlp_width=4 * self.text_width,
            output_dim=output_dim or self.feature_dim,
            num_merges=self.num_merges,
            pool=self.text_pool,
        )

    def preprocess(self) -> Preprocess:
        """Shorter side to the image size, centre crop, values to [-1, 1]."""
        return Preprocess(
            image_size=(self.image_size, self.image_size),
            resize=self.image_size,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
