"""What a search can be told: the only home of its defaults, its help texts and the rules of its values."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from patchrank.errors import UserError
from patchrank.search.criteria import CRITERIA
from patchrank.search.strategies import DEFAULT, Options, strategy_by_name
from patchrank.search.variants import CHUNK


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Flags of every command that puts the pictures of one split to a model."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    data: str = "digits"
    """Data set: a row of the catalog, or "folder"."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    split: str | None = None
    """Split to take; without it "val" ("all" for --data folder)."""
    limit: int | None = 64
    """Images, spread over the classes; smaller limits are nested in larger ones. None: all."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SplitConfig):
    """Rank the patches of every image by what losing them does to a frozen image tower."""

    layer: int | None = None
    """Blocks that run before the cut; without it a quarter of the depth."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop" (the papers)."""
    merge_norm: str = "preserve"
    """Norm of folded tokens: "preserve" or "mean"."""
    criterion: str = "preservation"
    """What hurts: preservation, confidence or label (an oracle)."""
    strategy: str = DEFAULT
    """How to search: joint, gradient, evolve, regression (all fast), greedy (exact with --step 1), sweep (one pass)."""
    options: Options = field(default_factory=Options)
    """What the strategy can be told."""
    seed: int = 0
    """Seed of strategies that draw."""
    chunk: int = CHUNK
    """Pruned variants per call; part of the recorded request."""
    shard_size: int = 8
    """Images per shard: what a kill can cost."""
    threads: int | None = None
    """CPU threads per process; without it torch's default. Part of the recorded request."""
    out: Path = Path("out/search")
    """Folder of the ranking store, its table and its pictures."""
    keep: tuple[float, ...] = (0.8, 0.6, 0.4)
    """Keep ratios of the table and the pictures; the search itself does not depend on them."""
    explain: int = 0
    """Images to draw into <out>/pictures: original, ranking, kept patches, deletion curve."""
    dry_run: bool = False
    """Say what the search would cost, and stop; nothing is written."""

    def __post_init__(self) -> None:
        if self.split is None:
            object.__setattr__(self, "split", "all" if self.data == "folder" else "val")

    def to_dict(self) -> dict:
        """JSON-able form."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def check(config: SearchConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    if config.criterion not in CRITERIA:
        raise UserError(f"--criterion {config.criterion}: unknown; choose one of {', '.join(CRITERIA)}")
    strategy_by_name(config.strategy)
    for name, least in (("limit", 1), ("chunk", 1), ("shard_size", 1), ("threads", 1), ("explain", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    _check_options(config.strategy, config.options)
    for keep in config.keep:
        if not 0.0 < keep <= 1.0:
            raise UserError(f"--keep {keep:g}: must lie in (0, 1]; 0.6 keeps 60 % of the patches")
    if not config.keep:
        raise UserError("--keep: names no ratio; write for example --keep 0.8 0.6 0.4")
    _check_device(config.device)


def _check_options(strategy: str, options: Options) -> None:
    """The options that this strategy reads: counts from 1 (mutations and steps may be 0), ratios in (0, 1]."""
    for name, value in strategy_by_name(strategy).options(options).items():
        least = 0 if name in ("mutations", "steps") else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
        if isinstance(value, float) and not 0.0 < value <= 1.0:
            raise UserError(f"--{name} {value:g}: must lie in (0, 1]")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; choose cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here; use cuda or a lower number")
