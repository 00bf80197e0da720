"""The rules of a run's values, all that needs no data: one line for each that is broken."""

import math
from dataclasses import replace
from importlib.util import find_spec

import torch

from patchrank.errors import UserError
from patchrank.pretrain.config import PretrainConfig, weight_of
from patchrank.pretrain.curriculum import CURRICULA
from patchrank.pretrain.maskers import MASKERS
from patchrank.pretrain.pairs import parts_of
from patchrank.pretrain.recipes import RECIPES
from patchrank.word_pieces import MAX_MERGES


def check(config: PretrainConfig, num_processes: int = 1) -> None:
    """Check all that needs no data. Raises: UserError."""
    if config.recipe not in RECIPES:
        raise UserError(f"--recipe {config.recipe}: unknown; choose one of {', '.join(RECIPES)}")
    if config.setting not in ("small", "paper"):
        raise UserError(f"--setting {config.setting}: unknown; choose small or paper")
    if config.contrast not in ("clip", "siglip"):
        raise UserError(f"--contrast {config.contrast}: unknown; choose clip or siglip")
    _check_masker(config)
    _check_least(config)
    _check_threshold(config)
    _check_weights(config)
    _check_locked(config)
    for names in (config.data, config.eval_data or config.data):
        parts_of(names, "--eval-data" if names == config.eval_data else "--data")
    for name in ("threads", "num_steps", "batch_size", "num_layers", "num_heads", "feature_dim",
                 "eval_every", "save_every", "log_every", "patch_size", "width", "accumulate", "text_head",
                 "text_width", "head_width", "head_out"):  # fmt: skip
        _at_least(config, name, 1)
    _at_least(config, "context", 3)
    for name in ("num_warmup", "shift", "seed", "workers", "num_merges", "text_layers"):
        _at_least(config, name, 0)
    parts = num_processes * config.accumulate
    recipe, grid = RECIPES[config.recipe], config.image_size // config.patch_size
    unit = max([view.mask.block for view in recipe.views] + ([recipe.teacher.shrink] if recipe.teacher else []))
    rules = (
        ("image_size", config.image_size >= config.patch_size and config.image_size % config.patch_size == 0,
         f"must be a multiple of --patch-size {config.patch_size}"),
        ("image_size", grid % unit == 0,
         f"must be a multiple of {unit * config.patch_size}: {config.recipe} has blocks of {unit} x {unit} patches"),
        ("width", config.width % (4 * config.num_heads) == 0,
         f"must be a multiple of 4 x --num-heads {config.num_heads}"),
        ("text_width", config.text_width % config.text_head == 0,
         f"must be a multiple of {config.text_head}, the width of a head"),
        ("num_merges", config.num_merges == 0 or recipe.locked, "pieces of words are for --recipe lit; leave it out"),
        ("num_merges", config.num_merges <= MAX_MERGES, f"must be at most {MAX_MERGES}, all of CLIP's merges"),
        ("text_layers", config.text_layers > 0 or recipe.locked, "must be 1 or more; 0 is for --recipe lit"),
        ("text_pool", config.text_pool in ("end", "mean"), "unknown; choose end or mean"),
        ("text_pool", config.text_pool == "end" or recipe.locked, "the mean is for --recipe lit; leave it out"),
        ("word_drop", 0 <= config.word_drop < 1, "must lie in [0, 1); 0.1 hides every tenth token"),
        ("num_warmup", config.num_warmup < config.num_steps, f"must be less than --num-steps {config.num_steps}"),
        ("batch_size", config.batch_size % parts == 0,
         f"must be a multiple of {parts}: {num_processes} processes x --accumulate {config.accumulate}"),
        ("batch_size", config.batch_size // parts > 1 or not {"simclr", "byol"} & set(config.row.terms),
         f"must be {2 * parts} or more: batch norms of {config.recipe} need two pictures in each of {parts} parts"),
        ("threads", config.threads <= 1024, "must be at most 1024"),
        ("seed", config.seed < 2**63, "must be below 2^63"),
        ("context", config.context <= 4096, "must be at most 4096; longer texts are cut"),
        ("lr", 0 < config.lr < math.inf, "must be positive and finite"),
        ("lr_end", 0 <= config.lr_end <= config.lr, f"must lie between 0 and --lr {config.lr}"),
        ("decay", 0 < config.decay <= 1, "must lie in (0, 1]; 1 is the usual cosine"),
        ("curriculum", 0 <= config.curriculum < 1, "must lie in [0, 1)"),
        ("weight_decay", 0 <= config.weight_decay < math.inf, "must be 0 or more, and finite"),
        ("beta2", 0 <= config.beta2 < 1, "must lie in [0, 1)"),
        ("epsilon", 0 < config.epsilon < math.inf, "must be positive and finite"),
        ("max_norm", config.max_norm is None or config.max_norm >= 0, "must not be negative; 0 switches it off"),
        ("tuning", 0 <= config.tuning <= 1, "must lie in [0, 1]"),
        ("cheap_start", 0 <= config.cheap_start < 1, "must lie in [0, 1)"),
        ("cheap_keep", 0 < config.cheap_keep <= 1, "must lie in (0, 1]; 0.3 shows 30 % of the patches"),
        ("least_area", 0 < config.least_area <= 1, "must lie in (0, 1]; 0.5 crops at least half of a picture"),
        ("precision", config.precision in ("float32", "bfloat16"), "unknown; choose float32 or bfloat16"),
        ("start", config.start in ("usual", "local"), "unknown; choose usual or local"),
    )  # fmt: skip
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: {rule}")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs tensorboard; pip install 'patchrank[pretrain]', or leave it out")
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"--device {config.device}: unknown; choose cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")


def _check_masker(config: PretrainConfig) -> None:
    name, recipe = config.masker, RECIPES[config.recipe]
    if name is None:
        return
    if name not in MASKERS:
        raise UserError(f"--masker {name}: unknown; choose one of {', '.join(MASKERS)}")
    if all(view.mask.keep >= 1.0 for view in recipe.views):
        raise UserError(f"--masker {name}: {config.recipe} masks nothing; choose a recipe that does, such as flip50")
    if name.startswith("pgs") and any(view.mask.block > 1 for view in recipe.views):
        raise UserError(f"--masker {name}: protects patches, {config.recipe} keeps blocks of them; use it with flip50")
    if "teacher" in MASKERS[name].needs and recipe.teacher is None:
        raise UserError(f"--masker {name}: asks a teacher; choose a recipe that has one, such as att1x50")


def _check_least(config: PretrainConfig) -> None:
    if config.least is None:
        return
    said = f"--least {config.least}"
    specs = [view.mask for view in replace(config, least=None, threshold=None).row.views if view.mask.keep < 1.0]
    if not specs:
        raise UserError(f"{said}: {config.recipe} masks nothing; leave it out")
    mean = min(spec.mean_keep or spec.keep for spec in specs)
    if not 0 < config.least <= mean:
        raise UserError(f"{said}: must lie in (0, {mean:g}], the share that {config.recipe} keeps on average")
    for spec in specs:
        if MASKERS[spec.masker].needs or spec.block > 1 or spec.rest != "drop":
            raise UserError(
                f"{said}: needs scores of patches that do not change in the run, and no fold; use it with "
                "--recipe eclip, or --recipe pgs-0.5 --masker pgs-pixels"
            )


def _check_threshold(config: PretrainConfig) -> None:
    if config.threshold is None:
        return
    said = f"--threshold {config.threshold}"
    specs = [view.mask for view in replace(config, threshold=None).row.views if view.mask.mean_keep is not None]
    if not specs:
        raise UserError(f"{said}: only the masks of --recipe eclip, or with --least, have one; leave it out")
    most = 2 if specs[0].masker.startswith("pgs") else 1  # a transport plan adds up to 1 to the cosine
    if not -1 <= config.threshold <= most:
        raise UserError(f"{said}: is a cosine, must lie in [-1, {most}]; without it one is searched for")


def _check_weights(config: PretrainConfig) -> None:
    terms = RECIPES[config.recipe].terms
    for said in config.weights:
        try:
            name, weight = weight_of(said)
        except ValueError:
            name, weight = said, math.nan
        if name not in terms or not 0 <= weight < math.inf:
            raise UserError(
                f"--weights {said}: must be loss=weight, weight 0 or more; {config.recipe} has {', '.join(terms)}"
            )
        if name == "clip" and weight == 0:
            raise UserError(f"--weights {said}: the contrastive loss stays; give it a weight above 0")


def _check_locked(config: PretrainConfig) -> None:
    for name, usual in (("model", "embedded"), ("pretrained", ""), ("cache", None)):
        if getattr(config, name) != usual and not RECIPES[config.recipe].locked:
            said = f"--{name} {getattr(config, name)}"
            raise UserError(f"{said}: is for the locked tower of --recipe lit; {config.recipe} starts from nothing")


def notes(config: PretrainConfig) -> list[str]:
    """A line for each flag that was given and changes nothing; such flags are allowed, as sweeps over recipes want."""
    recipe, told = config.row, PretrainConfig(recipe=config.recipe, setting=config.setting, data=config.data)
    heads = {"simclr", "byol", "distill"} & set(recipe.terms)
    tower = ("image_size", "patch_size", "width", "num_layers", "num_heads", "feature_dim", "start", "frozen_patches",
             "least_area", "cheap_start", "cheap_keep", "tuning")  # fmt: skip
    rules = (
        (tower, not recipe.locked, "the image tower is a checkpoint's and sees whole pictures"),
        (("head_width",), heads, f"{config.recipe} has no heads"),
        (("head_out",), heads - {"distill"}, f"{config.recipe} has no heads of SimCLR or BYOL"),
        (("curriculum",), config.data in CURRICULA, f"only {', '.join(CURRICULA)} can be made easier"),
        (("cheap_keep",), config.cheap_start > 0, "there is no --cheap-start"),
    )
    return [
        f"note: --{name.replace('_', '-')} {getattr(config, name)} changes nothing: {why}"
        for names, used, why in rules
        for name in names
        if not used and getattr(config, name) != getattr(told, name)
    ]


def _at_least(config: PretrainConfig, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {least} or more")
