"""A locked image tower: its features of all training pictures are computed once and kept beside the run.

Letters: N pictures, B of a batch, D feature.
"""

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from patchrank.atomic import write_tensors
from patchrank.data import Dataset
from patchrank.loading import load_clip
from patchrank.preprocess import Preprocess
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.distributed import World, barrier
from patchrank.pretrain.model import Pair, locked_pair
from patchrank.pretrain.pictures import Pictures, normalise

_BATCH = 64


def locked_start(config: PretrainConfig) -> tuple[Pair, Preprocess, str]:
    """Towers of a locked run, the checkpoint's transform, and the hash of its weights."""
    clip = load_clip(config.model, config.pretrained)
    pair = locked_pair(clip.tower, config.text_config(clip.tower.config.feature_dim), config.seed)
    return pair, clip.preprocess, clip.weights_hash


@torch.no_grad()
def locked_features(
    tower: nn.Module, weights_hash: str, dataset: Dataset, preprocess: Preprocess, config: PretrainConfig, world: World
) -> Tensor:
    """Features (N, D) float32, not normalised, of whole pictures; read from --out if they are those of this tower.

    Broken pictures leave the data set. Under several processes the leading one computes them.
    """
    path = config.out / "features.safetensors"
    wanted = {"weights": weights_hash, "data": dataset.name, "num": str(len(dataset.images))}
    if world.leads and _metadata(path) != wanted:
        features, device = [], next(tower.parameters()).device
        pictures = Pictures(dataset, preprocess, max_bytes=0)
        for start in tqdm(range(0, len(dataset.images), _BATCH), desc="features", unit="batch"):
            numbers = range(start, min(start + _BATCH, len(dataset.images)))
            image_BCHW, good = pictures.batch(numbers)
            feature_BD = torch.full((len(numbers), tower.config.feature_dim), torch.nan)
            if good:
                found_BD = tower(normalise(image_BCHW, preprocess).to(device)).float().cpu()
                feature_BD[[number - start for number in good]] = found_BD
            features.append(feature_BD)
        write_tensors(path, {"feature_ND": torch.cat(features)}, wanted)
    barrier()
    with safe_open(str(path), "pt") as file:
        feature_ND = file.get_tensor("feature_ND")
    good_N = feature_ND.isfinite().all(1)
    dataset.images[:] = [item for item, good in zip(dataset.images, good_N.tolist()) if good]
    return feature_ND[good_N]


def _metadata(path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    with safe_open(str(path), "pt") as file:
        return file.metadata()
