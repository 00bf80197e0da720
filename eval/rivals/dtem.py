"""DTEM: merging by an embedding of its own, learned for merging while the tower stays frozen; written from the paper.

Source: Lee & Hong 2024, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers", sections
3.1 and 3.3: in every merging block a linear map of what the block's attention reads gives each token an embedding, and
ToMe's matching compares embeddings instead of keys; merged tokens are means weighted with sizes. Training: `dtem_soft`.
Deviations: the embedding starts as the block's keys, mean over heads, so an untrained one is ToMe exactly; the authors'
starts at random. It has the channels of a head, as theirs below width 1024; theirs has twice as many from there on.

Letters: B batch, L tokens, C width, M embedding channels.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eval.rivals.tome import ToMe, left_after, matching_macs, r_at
from eval.rivals.walk import Step, inner_layers
from patchrank.atomic import write_tensors
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.linear import Linear
from patchrank.tower import TowerConfig, VisionTower

FILE = "dtem.safetensors"


class Embedding(nn.Module):
    """One linear map (C -> M) for each block that tokens can leave in; M as the keys of a head."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        dim = config.width // config.num_heads
        self.layers = nn.ModuleDict({str(layer): Linear(config.width, dim) for layer in inner_layers(config)})

    @torch.no_grad()
    def start_from_keys(self, tower: VisionTower) -> "Embedding":
        """Begin as each block's keys, mean over heads."""
        width, num_heads = tower.config.width, tower.config.num_heads
        for name, layer in self.layers.items():
            qkv = tower.blocks[int(name)].qkv
            layer.weight.copy_(qkv.weight[width : 2 * width].unflatten(0, (num_heads, -1)).mean(0))
            layer.bias.zero_()
            if qkv.bias is not None:
                layer.bias.copy_(qkv.bias[width : 2 * width].unflatten(0, (num_heads, -1)).mean(0))
        return self

    def forward(self, layer: int, normalised_BLC: Tensor) -> Tensor:
        """Embedding (B, L, M) of tokens as the block's attention reads them."""
        return self.layers[str(layer)](normalised_BLC)


def save(path: Path, embedding: Embedding, source_hash: str) -> None:
    """Write a trained embedding; `source_hash` names the tower's weights."""
    write_tensors(path, embedding.state_dict(), {"weights_hash": source_hash})


def load(path: Path, tower: VisionTower) -> Embedding:
    """Read what `save` wrote. Raises: UserError for an absent or damaged file, or one of another tower."""
    path = path / FILE if path.is_dir() else path
    embedding = Embedding(tower.config)
    try:
        with safe_open(str(path), "pt") as file:
            found = (file.metadata() or {}).get("weights_hash")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if found != weights_hash(tower):
            raise ValueError(f"made for weights {str(found)[:12]}")
        embedding.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is no embedding for this tower ({reason}); train one for this model") from error
    return embedding.to(tower.position.device).eval().requires_grad_(False)


def choice_macs(config: TowerConfig, r: Mapping[int, int]) -> dict[int, int]:
    """{layer: MACs}: embeddings of all tokens that come to a merging block, and the matching."""
    matching, patches = matching_macs(config, r), config.num_patches
    dim, macs = config.width // config.num_heads, {}
    for layer, left in left_after(config, r).items():
        macs[layer] = matching[layer] + (config.num_prefix + patches) * config.width * dim
        patches = left
    return macs


class DTEM(ToMe):
    """ToMe's walk with learned embeddings."""

    def __init__(self, tower: VisionTower, r: Mapping[int, int], *, embedding: Embedding) -> None:
        super().__init__(tower, r, choice_macs(tower.config, r))
        self.embedding = embedding

    def metric(self, step: Step) -> Tensor:
        return self.embedding(step.layer, step.block.norm1(step.before_BLC))


def with_embedding(tower: VisionTower, macs: float, embedding: Embedding, first: int = 0, last: int = 11) -> DTEM:
    """Merging in blocks `first` .. `last` of 12 at a budget. Raises: UserError for a budget out of reach."""
    return r_at(tower, macs, first, last, rival=partial(DTEM, embedding=embedding))


def build(tower: VisionTower, macs: float, path: Path, *, first: int = 0, last: int = 11) -> DTEM:
    """A trained embedding at a budget. Raises: UserError as `load`, or for a budget out of reach."""
    return with_embedding(tower, macs, load(path, tower), first, last)
