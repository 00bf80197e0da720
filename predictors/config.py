"""What training and calibration can be told: the only home of their defaults, help texts and rules."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from patchrank.data import CATALOG
from patchrank.errors import UserError
from patchrank.spec import RESTS, SELECTS, WHERES
from predictors.calibration import PARTS
from predictors.losses import needs_feature, needs_golden, parse_weights
from predictors.tables import COMPENSATION, PREDICTORS, row


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both commands share."""

    data: str = "digits"
    """Data set of the training images: a row of the catalog. Labels are never read, except for reports."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    split: str = "train"
    """Split to train on and to hold images out of ("all" for a flat folder)."""
    limit: int | None = 1000
    """Images to train on, spread over the classes; they stay in memory as tokens. None: all."""
    held_out: int = 200
    """Images of the same split to judge by, never trained on; the same ones for every --limit."""
    views: bool = False
    """Train on a random crop of each image, for towers that were trained on these images and know them."""
    judged: int = 200
    """How many of these the judgements during the run look at; the report looks at all."""
    cache: Path | None = None
    """Folder that keeps the tokens of these images for other runs; without it they live in memory only."""
    num_steps: int = 150
    """Steps of the whole run."""
    batch_size: int = 16
    """Images per step."""
    save_every: int = 50
    """Steps between judgements on the held-out images, each with a state on disk: what a kill can cost."""
    patience: int = 0
    """Judgements without progress after which the run ends; 0: never."""
    seed: int = 0
    """Seed of weights, batches, keep rates and noise."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    threads: int | None = None
    """CPU threads; without it torch's default. The same number gives the same bits."""
    tensorboard: bool = False
    """Write TensorBoard's event files into --out; needs pip install 'patchrank[pretrain]'."""

    def settings(self) -> dict[str, Any]:
        """What must not change within a run, as JSON values."""
        free = ("out", "data_root", "device", "cache", "table", "table_keep", "tensorboard")
        values = {name: value for name, value in asdict(self).items() if name not in free}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Common):
    """Train a scorer for a frozen image tower, with its own metric and added tokens if wanted; no labels needed."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    macs: float | None = None
    """Share of the dense image tower's MACs to spend, scorer included: the `accurate` schedule. Default 0.7."""
    keep: float | None = None
    """Instead of --macs: share of the patches that one cut leaves."""
    cuts: str | None = None
    """Instead of --macs: layer:count or layer:ratio of each cut, such as 3:156,5:136."""
    layer: int | None = None
    """Blocks that run before the one cut of --keep; without it a quarter of the depth."""
    where: str | None = None
    """Where the cuts of --cuts or --keep stand: "before" a block (without it) or "inside" it, before its MLP."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop" (the papers)."""
    select: str = "cover"
    """What the scores are: log importances of a covering selection ("cover"), its priorities ("suppress"), or the
    ranking itself ("topk")."""
    keep_range: tuple[float, float] | None = None
    """Keep ratios behind the last cut that training draws from, one model serves them all; without it from half to
    twice what the budget leaves there."""
    scorer: str = "mlp"
    """Row of PREDICTORS: linear, mlp, mixer (one cut only), text-similarity."""
    hidden: int | None = None
    """Width of the hidden layer of --scorer mlp; without it a quarter of the tower's. Its MACs count in the budget."""
    metric_dim: int | None = None
    """Channels of a learned fold metric that comes with the scorer; 0: the block's keys decide about nearness; without
    it three eighths of a head's where nearness matters and --loss reads features."""
    salient: bool = True
    """Let the scorer see how much the class token attends to each patch, where there is one: one row of queries."""
    weighted: bool = True
    """Let patches count by their score in a merged token, by a learned amount; without it all count alike."""
    added: str | None = None
    """Compensation tokens, trained along: static or summary; without it none."""
    num_added: int = 1
    """How many of them."""
    loss: str = "distill"
    """Losses by weight, such as distill:1,listwise:0.1; bce, listwise and pairwise need --store."""
    store: Path | None = None
    """Ranking store of `patchrank.search` on these images and this layer: golden scores for the first cut."""
    noise: float = 0.3
    """Noise on the standardised scores in training, so that it sees keep sets near the best; 0 for none."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decay of the weights."""
    table: int = 0
    """Held-out images of the closing table of rivals, each with fold and drop; 0: no table."""
    table_keep: tuple[float, ...] = (0.8, 0.6, 0.5, 0.4)
    """Keep ratios of that table."""
    out: Path = Path("out/train")
    """Folder of the run and in the end of the pruned tower; the same command goes on after a kill."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(Common):
    """Re-fit LayerNorms and biases behind the cut to pruned tokens, by the unpruned tower's features; no labels."""

    pruned: Path = Path("out/train")
    """Folder that `predictors.train` wrote, or a calibration to go on from; what it holds stays as it is."""
    macs: float | None = None
    """Another budget for the same scorer and cuts, a share of the dense MACs; without it the one it was trained for."""
    parts: str = "biases"
    """What is re-fitted: "norms", or "biases" (norms and all biases)."""
    lora_rank: int = 0
    """Also train a correction of this rank for every linear map behind the cut, added to its weight in the end: closer
    features for half as much time again, and the graph stays as it is. 4 serves well; 0: none."""
    size_bias: bool = True
    """Let attention count a merged token as often as it has patches; --no-size-bias trains that away, and the graph's
    attention is plain. Worth it where cosine falls by less than 0.002."""
    readout: bool = False
    """End with a ridge regression to the unpruned features, folded into the projection: one more, of the class row,
    where the tower has none."""
    answers: float = 0.0
    """Weight of the divergence from the unpruned tower's answers, where the model has classes for these images; 0: only
    features count. No labels either way."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decay of what is re-fitted."""
    out: Path = Path("out/calibrate")
    """Folder of the run and in the end of the calibrated tower."""


def _at_least(config: Common, names: tuple[str, ...], least: int) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")


def check_common(config: Common) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    if config.data not in CATALOG:
        raise UserError(f"--data {config.data}: unknown; choose one of {', '.join(CATALOG)}")
    _at_least(config, ("limit", "held_out", "judged", "num_steps", "batch_size", "save_every", "threads"), 1)
    _at_least(config, ("patience", "seed"), 0)
    if not config.lr > 0:
        raise UserError(f"--lr {config.lr:g}: must be positive")
    if not config.weight_decay >= 0:
        raise UserError(f"--weight-decay {config.weight_decay:g}: must not be negative")
    if config.device != "cpu" and not (config.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {config.device}: must be cpu, or cuda where PyTorch sees a GPU")


def check_train(config: TrainConfig) -> None:
    """Check a training's flags. Raises: UserError."""
    check_common(config)
    row(PREDICTORS, "scorer", config.scorer)
    if config.added is not None:
        row(COMPENSATION, "added", config.added)
    for flag, value, known in (("rest", config.rest, RESTS), ("select", config.select, SELECTS)):
        if value not in known:
            raise UserError(f"--{flag} {value}: unknown; choose one of {', '.join(known)}")
    if config.where is not None:
        if config.where not in WHERES:
            raise UserError(f"--where {config.where}: unknown; choose one of {', '.join(WHERES)}")
        if config.cuts is None and config.keep is None:
            raise UserError(f"--where {config.where}: goes with --cuts or --keep; the schedule of --macs has its own")
    _at_least(config, ("metric_dim", "table"), 0)
    _at_least(config, ("num_added", "hidden"), 1)
    if config.hidden is not None and config.scorer != "mlp":
        raise UserError(f"--hidden {config.hidden}: belongs to --scorer mlp, not {config.scorer}; leave it out")
    if not config.noise >= 0:
        raise UserError(f"--noise {config.noise:g}: must not be negative")
    weights = parse_weights(config.loss)
    if needs_golden(weights) and config.store is None:
        raise UserError(f"--loss {config.loss}: reads golden rankings; give --store, or use distill")
    if config.store is not None and not needs_golden(weights):
        raise UserError(
            f"--store {config.store}: --loss {config.loss} does not read it; add listwise:1, or leave it out"
        )
    if not needs_feature(weights) and (config.added or config.metric_dim):
        raise UserError(f"--loss {config.loss}: says nothing about tokens or metrics; add distill:1")


def check_calibrate(config: CalibrateConfig) -> None:
    """Check a calibration's flags. Raises: UserError."""
    check_common(config)
    if not config.answers >= 0:
        raise UserError(f"--answers {config.answers:g}: must not be negative")
    if config.parts not in PARTS:
        raise UserError(f"--parts {config.parts}: unknown; choose one of {', '.join(PARTS)}")
    _at_least(config, ("lora_rank",), 0)
