"""What a suite can be told: the only home of its defaults and help texts."""

from dataclasses import dataclass
from pathlib import Path

from eval.rivals import RIVALS
from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.presets import check_macs

BUDGETS = (0.85, 0.70, 0.56, 0.45)
RUNTIMES = ("torch", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Everything for one model: all methods on all data sets at equal MACs, speed, pictures; skips what exists."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    datasets: tuple[str, ...] = ()
    """Data sets; without it the one that the model is at home on and the seven of the papers (embedded: digits). Sets
    of captions (flickr8k, coco) are judged by retrieval."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    methods: tuple[str, ...] = tuple(RIVALS)
    """Rows of the rivals' table; the unpruned tower and "ours" are always there."""
    files: tuple[str, ...] = ()
    """Trained or searched files that some rows need, as dtem=out/dtem; rows without theirs are skipped and say so."""
    macs: tuple[float, ...] = BUDGETS
    """Budgets: shares of the dense image tower's MACs, its last block computing the class row only."""
    limit: int | None = None
    """Images of each test split, spread over the classes; smaller limits are nested in larger ones. Without it 1,000,
    and 150 of the embedded model's digits."""
    full: bool = False
    """All images of every test split, whatever --limit says."""
    oracle_limit: int | None = None
    """Images for the oracles, which search every image. Without it 100, and 15 of the embedded model's digits."""
    protocol: str = "auto"
    """zero-shot by coop, openai or vtab, probe, or auto: a head or text tower that knows the classes, else probe."""
    fit_limit: int | None = 4000
    """Train images that a probe is fitted on, validation included; None: all."""
    batch_size: int = 32
    """Images per call."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    cache: Path | None = Path("out/features")
    """Folder of cached features, shared with the other commands; None keeps none, and a kill costs everything."""
    runtimes: tuple[str, ...] = RUNTIMES[:1]
    """Where to time: torch, onnxruntime (exported graphs of the methods that have one); none: no throughput."""
    speed_batch: int = 16
    """Images per timed call."""
    rounds: int = 5
    """Timed calls of every row, each right behind one of the unpruned tower; one more is thrown away."""
    pictures: int = 4
    """Best and worst images of every data set to show, so many of each; 0: none."""
    photos: bool = True
    """Hold these images in the results; --no-photos holds only which patches are kept, for data that must not be
    passed on."""
    seed: int = 0
    """Seed of everything that draws."""
    out: Path = Path("out/suite")
    """Folder of the records; python -m eval report reads it."""

    @property
    def num_images(self) -> int | None:
        """Images of each test split; None: all."""
        default = _FEW[0] if self.model == "embedded" else _MANY[0]
        return None if self.full else default if self.limit is None else self.limit

    @property
    def num_oracle(self) -> int:
        """Images for the oracles."""
        default = _FEW[1] if self.model == "embedded" else _MANY[1]
        return default if self.oracle_limit is None else self.oracle_limit


_FEW, _MANY = (150, 15), (1000, 100)
"""Images for methods and for oracles: of the embedded model, whose suite takes minutes, and of others."""


def check(config: SuiteConfig) -> None:
    """Check what needs neither model nor data, and is the suite's own. Raises: UserError."""
    for name in config.runtimes:
        if name not in RUNTIMES:
            raise UserError(f"--runtimes {name}: unknown; choose from {', '.join(RUNTIMES)}")
    for name in config.methods:
        if name not in RIVALS:
            raise UserError(f"--methods {name}: unknown; choose from {', '.join(RIVALS)}")
    if not config.macs or len(set(config.macs)) != len(config.macs):
        raise UserError(f"--macs {' '.join(map(str, config.macs))}: must be one or more different shares, as 0.7 0.56")
    for macs in config.macs:
        check_macs(macs)
    for name in ("limit", "oracle_limit", "speed_batch", "rounds"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    if config.pictures < 0:
        raise UserError(f"--pictures {config.pictures}: must be 0 or more")


def file_stem(clip: LoadedClip) -> str:
    """Part of a file name that tells models apart."""
    return f"{clip.model_name.replace('/', '-')}_{clip.weights_hash[:8]}"
