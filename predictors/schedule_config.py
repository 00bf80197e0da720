"""What `python -m predictors.schedule` can be told: the only home of its defaults, help texts and rules."""

from dataclasses import dataclass
from pathlib import Path

from patchrank.data import CATALOG
from patchrank.errors import UserError
from patchrank.presets import check_macs
from patchrank.spec import RESTS


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Find cuts and counts for a budget: time every stage, try small families of schedules, keep the best feature."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    data: str = "digits"
    """Data set of the images that decide; labels are not read."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    split: str = "train"
    """Split of these images ("all" for a flat folder)."""
    macs: float | None = None
    """Budget: share of the dense image tower's MACs. Default 0.7."""
    ms: float | None = None
    """Instead of --macs: milliseconds per image on this machine, at --batch-size."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop"."""
    num_images: int = 128
    """Images that decide; with few of them chance does."""
    held_out: int = 48
    """Other images, on which the table's cosines are taken."""
    num_moves: int = 24
    """Single moves tried on the best schedule; 0: none."""
    refit: int = 0
    """Steps of calibration after which the best schedule of each first block is judged again, and the best then is
    taken; 0: the tower as it is decides. 60 are enough, about a minute a schedule on a ViT-Ti."""
    refit_images: int = 1000
    """Images that these calibrations train on, none of those that decide."""
    finalists: int = 6
    """How many schedules are calibrated."""
    batch_size: int = 16
    """Images per call when timing, and per step of --refit."""
    rounds: int = 9
    """Timings of each stage; the fastest counts."""
    seed: int = 0
    """Seed of the moves."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    out: Path = Path("out/schedule")
    """Folder of schedule.json, schedule.csv and schedule.md."""


def check(config: ScheduleConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    if config.data not in CATALOG:
        raise UserError(f"--data {config.data}: unknown; choose one of {', '.join(CATALOG)}")
    if config.rest not in RESTS:
        raise UserError(f"--rest {config.rest}: unknown; choose one of {', '.join(RESTS)}")
    if config.macs is not None and config.ms is not None:
        raise UserError(f"--macs {config.macs:g} --ms {config.ms:g}: exactly one of them is the budget; drop one")
    if config.macs is not None:
        check_macs(config.macs)
    if config.ms is not None and not config.ms > 0:
        raise UserError(f"--ms {config.ms:g}: must be positive")
    for name in ("num_images", "held_out", "batch_size", "rounds", "refit_images", "finalists"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    for name in ("num_moves", "refit"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 0 or more")
