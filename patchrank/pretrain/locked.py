"""A locked image tower: its features of all pictures are computed once, and training only touches the text tower.

Letters: N pictures, n readable ones, D feature.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.checkpoints.saved import TowerReference
from patchrank.data import Dataset
from patchrank.loading import load_clip, reference_to
from patchrank.preprocess import Preprocess
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.distributed import World, barrier
from patchrank.pretrain.feature_cache import FeatureCache
from patchrank.pretrain.model import Pair, locked_pair
from patchrank.pretrain.pictures import Pictures


@dataclass(frozen=True, kw_only=True)
class Locked:
    """The image tower of a locked run: where it comes from, and its features."""

    reference: TowerReference
    preprocess: Preprocess
    cache: FeatureCache

    def train_features(self, dataset: Dataset, world: World) -> Tensor:
        """Features (N, D) float32, not normalised; broken pictures leave the data set.

        Under several processes the leading one computes what is not cached.
        """
        if world.leads:
            self.cache.features(dataset)
        barrier()
        feature_ND = self.cache.features(dataset)
        good_N = feature_ND.isfinite().all(1)
        dataset.images[:] = [item for item, good in zip(dataset.images, good_N.tolist()) if good]
        return feature_ND[good_N]

    def look(self, pictures: Pictures) -> tuple[Tensor, list[int]]:
        """Unit features (n, D) of all pictures that can be opened, and their indices, as checks want them."""
        feature_ND = self.cache.features(pictures.dataset)
        numbers = feature_ND.isfinite().all(1).nonzero().flatten()
        return F.normalize(feature_ND[numbers], dim=-1), numbers.tolist()


def locked_start(config: PretrainConfig, device: str | torch.device = "cpu") -> tuple[Pair, Locked]:
    """Towers of a locked run on `device`, and what is known of the image tower."""
    clip = load_clip(config.model, config.pretrained)
    pair = locked_pair(clip.tower, config.text_config(clip.tower.config.feature_dim), config.seed).to(device)
    folder = config.cache or config.out / "features"
    cache = FeatureCache(folder, pair.tower, clip.weights_hash, clip.preprocess)
    reference = reference_to(config.model, config.pretrained, clip)
    return pair, Locked(reference=reference, preprocess=clip.preprocess, cache=cache)
