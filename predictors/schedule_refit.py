"""Which of several schedules is best once the tower was calibrated to it: a short calibration for each.

What costs an untrained tower least need not cost a calibrated one least: early and steep cuts are mended better than
they look. Letters: n images.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from patchrank.loading import LoadedClip
from patchrank.pruned import PrunedTower, Scorer
from patchrank.spec import PruneSpec
from predictors.calibrate import refit
from predictors.config import CalibrateConfig
from predictors.judging import cosines, pruned_features
from predictors.prepare import Images, load_images


def finalists(values: Mapping[str, tuple[float, PruneSpec]], num: int) -> dict[str, PruneSpec]:
    """Of {name: (cosine, spec)} the best that begins in each block, of these the best `num`; first blocks rise."""
    best: dict[int, str] = {}
    for name, (value, spec) in values.items():
        layer = spec.cuts[0][0]
        if layer not in best or value > values[best[layer]][0]:
            best[layer] = name
    chosen = sorted(best, key=lambda layer: values[best[layer]][0], reverse=True)[:num]
    return {best[layer]: values[best[layer]][1] for layer in sorted(chosen)}


def refitted_cosines(
    clip: LoadedClip, specs: Mapping[str, PruneSpec], scorer: Scorer, config: CalibrateConfig, *, quiet: bool = True
) -> dict[str, Tensor]:
    """Cosines (n,) to the unpruned features of the `held_out` images, by name, after a calibration to each spec.

    Each has a folder within `out`, and goes on there after a kill. Specs with the same first block, one behind the
    other, share their tokens. Raises: UserError for data that cannot be read.
    """
    found, images, at = {}, None, -1
    for name, spec in specs.items():
        if spec.cuts[0][0] != at:
            at = spec.cuts[0][0]
            images = load_images(config, clip, at, quiet=quiet)
        found[name] = _one(clip, PrunedTower(clip.tower, spec, scorer), images, config, name, quiet)
    return found


def _one(
    clip: LoadedClip, pruned: PrunedTower, images: Images, config: CalibrateConfig, name: str, quiet: bool
) -> Tensor:
    # Another budget, another number of steps or times measured anew give other states, beside those that are there.
    told = json.dumps([config.settings(), clip.weights_hash, pruned.spec.to_dict()], sort_keys=True)
    folder = config.out / f"{name.replace(' ', '-')}-{sha256(told.encode()).hexdigest()[:8]}"
    refitted, _ = refit(config, clip.weights_hash, pruned, images, folder, quiet=quiet)
    features = pruned_features(refitted, images.held_out, pruned.spec.cuts[0][0])
    return cosines(features, images.held_out.feature_nD)


def calibration(folder: Path, common: dict, num_images: int, num_judged: int, num_steps: int) -> CalibrateConfig:
    """Flags of the short calibrations: one judgement, at the end. Args: common: flags that both commands have."""
    return CalibrateConfig(
        **common, limit=num_images, held_out=num_judged, judged=num_judged, num_steps=num_steps, save_every=num_steps,
        lr=2e-3, out=folder,
    )  # fmt: skip
