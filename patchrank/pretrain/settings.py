"""Hyper-parameters of a run as plain data: those of the papers, and small ones for two cores.

Every field is a flag of the command as well; a flag that is given wins. Numbers of the papers are quoted from their
text or released code, with what differs here in the row's comment; common to all: AdamW, half a cosine after warm-up
to `lr_end`, logit scale at most 100.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The part of a run that a paper fixes beside its method."""

    num_steps: int
    batch_size: int
    lr: float
    lr_end: float = 0.0
    num_warmup: int
    decay: float = 1.0
    weight_decay: float
    beta2: float = 0.98
    epsilon: float = 1e-8
    max_norm: float | None = None
    """Limit of the gradient's norm; None: no limit."""
    precision: str = "float32"
    curriculum: float = 0.0
    cheap_start: float = 0.0
    cheap_keep: float = 0.3
    least_area: float = 0.5
    """A crop covers at least this share of the picture; 1: whole pictures, moved by `shift` pixels."""
    shift: int = 0
    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    feature_dim: int
    text_width: int
    text_head: int
    text_layers: int
    context: int
    num_merges: int = 0
    """Tokens are pieces of words, made by so many merges; 0: bytes."""
    text_pool: str = "end"
    """What a text's feature is made of: its "end" token, or the "mean" over all tokens."""
    word_drop: float = 0.0
    """Share of the tokens of a caption that the text tower does not see in training."""
    frozen_patches: bool = False
    """Whether the patch embedding stays at its random start (MoCo v3's trick)."""
    start: str = "usual"
    """How the image tower starts: "usual" (normal weights), or "local" (heads look at neighbours)."""
    head_width: int = 4096
    """Hidden width of the SimCLR and BYOL heads."""
    head_out: int = 256


_VIT_B = dict(
    image_size=224, patch_size=16, width=768, num_layers=12, num_heads=12, feature_dim=512,
    text_width=512, text_head=64, text_layers=12, context=77, precision="bfloat16",
)  # fmt: skip
"""ViT-B/16 with the text tower of all the papers. Deviation: bytes instead of 49,408 word pieces, bfloat16 for fp16."""

YFCC = Setting(**_VIT_B, num_steps=89_650, batch_size=4096, lr=5e-4, lr_end=1e-5, num_warmup=3586, weight_decay=0.5)
"""Plain CLIP in the frame of SLIP and A-CLIP: YFCC15M (14,689,580 pairs), 25 epochs, warm-up of one."""

ACLIP = replace(YFCC, frozen_patches=True)
"""A-CLIP's README command; weights of the terms and sizes of the heads are those of its released code."""

SLIP = replace(YFCC, lr=3e-3, weight_decay=0.1)
"""SLIP's released command."""

MASKCLIP = YFCC
"""MaskCLIP gives the frame (YFCC15M, 25 epochs, batch 4096); its rate is not at hand: plain CLIP's."""

FLIP50 = Setting(
    **_VIT_B, num_steps=390_625, batch_size=32_768, lr=4e-6 * 128, num_warmup=1563, weight_decay=0.2, beta2=0.95
)
"""FLIP: 4e-6 for every 256 samples, warm-up of 51.2 M samples, 32 epochs of LAION-400M; unmasked tuning at the end
(theirs: a hundredth of the rate for 0.32 epochs; here the last tenth of the same schedule). Deviations: class token
and learned positions for mean pooling and fixed ones; bytes for 32 word pieces; no flips."""

FLIP75 = replace(FLIP50, num_steps=195_313, batch_size=65_536, lr=4e-6 * 256, num_warmup=781)

PGS = Setting(**_VIT_B, num_steps=85_696, batch_size=4096, lr=1e-3, num_warmup=10_000, weight_decay=0.2, epsilon=1e-6)
"""CLIP-PGS's released command: CC12M (10,968,539 pairs), 32 epochs."""

ECLIP = replace(PGS, num_steps=171_360, batch_size=2048, lr=5e-4, num_warmup=2000)
"""E-CLIP's released command: the same data and epochs."""

LIT = Setting(
    **_VIT_B, num_steps=5000, batch_size=4096, lr=1e-3, num_warmup=150, weight_decay=0.01, beta2=0.999, max_norm=1.0
)
"""LiT: its authors' released configuration (COCO captions). The image tower is the checkpoint's. Deviations: a text
tower from scratch on bytes in place of BERT, no augmentation (so that features are computed once), logit scale from
1 / 0.07."""

SMALL = Setting(
    num_steps=10_000,
    batch_size=128,
    lr=1e-3,
    num_warmup=300,
    decay=0.7,
    weight_decay=0.1,
    max_norm=1.0,
    image_size=64,
    patch_size=8,
    width=128,
    num_layers=6,
    num_heads=4,
    feature_dim=128,
    text_width=96,
    text_head=32,
    text_layers=2,
    context=96,
    start="local",
    head_width=256,
    head_out=64,
)
"""Real pictures on two cores: 64 px, 64 patches; the image tower is six times the work of the text tower, as in
ViT-B/16. About 100 pictures a second on one core for plain CLIP."""

LIT_SMALL = replace(
    SMALL,
    num_steps=160,
    batch_size=2048,
    lr=4e-3,
    num_warmup=20,
    decay=1.0,
    text_width=256,
    text_layers=1,
    context=32,
    num_merges=8000,
    text_pool="mean",
    word_drop=0.1,
)
"""A text tower on some ten thousand captions beside a locked image tower: minutes on one core once the features are
there. Chosen on the 1,000 dev images of Flickr8k: batches as large as they go, words over bytes, few passes."""

DIGITS = replace(
    SMALL,
    num_steps=5000,
    batch_size=64,
    num_warmup=100,
    decay=0.5,
    weight_decay=0.05,
    curriculum=0.7,
    least_area=1.0,
    shift=4,
    image_size=112,
    width=96,
    num_heads=3,
    feature_dim=64,
    text_width=64,
    context=64,
)
"""Digits in clutter."""

EMBEDDED = replace(DIGITS, cheap_start=0.85)
"""The recipe of the embedded model."""


def setting_of(name: str, recipe_name: str, paper: Setting, small: Setting, data: str) -> Setting:
    """The setting that `--setting` names: the recipe's own, or the small one that fits the data."""
    if name == "paper":
        return paper
    if data == "digits":
        return EMBEDDED if recipe_name == "clip" else DIGITS
    return small


def told_default(name: str) -> str:
    """What --help says of a field that the setting gives: the values of recipe clip."""
    digits, small, paper = (getattr(setting, name) or 0 for setting in (EMBEDDED, SMALL, YFCC))
    said = f"{small}" if digits == small else f"{digits} on digits, {small} on other data"
    return f"(default of clip: {said}{'' if small == paper else f', {paper} with --setting paper'})"
