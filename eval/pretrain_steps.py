"""Single training steps of a recipe on made-up pairs, for timing and for memory. Letters: V views, B, H, W pixels.

`python -m eval.pretrain_steps '{"recipe": "aclip", ...}'` prints the peak memory of its own process.
"""

import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from patchrank.pretrain.batches import Batch
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.draws import generator
from patchrank.pretrain.learner import Learner
from patchrank.pretrain.model import Pair, build_pair, parameter_groups
from patchrank.pretrain.objectives import distinct, positives
from patchrank.pretrain.recipes import RECIPES
from patchrank.pretrain.threshold import is_open


def vit_b_config(recipe: str, batch_size: int, device: str = "cpu") -> PretrainConfig:
    """ViT-B/16 at 224 px, 12 layers of text at 77 tokens, float32; the patch embedding trains in every recipe."""
    return PretrainConfig(
        recipe=recipe, setting="paper", batch_size=batch_size, precision="float32", frozen_patches=False, device=device
    )


def small_config(recipe: str, batch_size: int, device: str = "cpu") -> PretrainConfig:
    """The towers of the small setting for real pictures."""
    return PretrainConfig(recipe=recipe, data="flickr8k", batch_size=batch_size, device=device)


@dataclass
class Ready:
    """A recipe that is about to make a step."""

    config: PretrainConfig
    learner: Learner
    optimiser: torch.optim.Optimizer
    batch: Batch


Moments = dict[torch.nn.Parameter, dict[str, torch.Tensor]]
"""State of AdamW by parameter."""


def towers_of(config: PretrainConfig) -> Pair:
    """Towers that all recipes share."""
    return build_pair(config.tower_config(), config.text_config(), 0, config.start).to(config.device)


def build(config: PretrainConfig, pair: Pair, moments: Moments) -> Ready:
    """Heads, teacher, optimiser and a batch of a recipe around the shared towers.

    A locked tower is frozen here and computes its features in the step. `moments` keeps the towers' part of the
    optimiser from one recipe to the next, so that its memory is touched before the clock starts.
    """
    if is_open(config):
        # noise has no clusters to search a threshold in; the tokens that are computed do not depend on it
        config = replace(config, threshold=0.0)
    locked = RECIPES[config.recipe].locked
    pair.tower.requires_grad_(not locked)
    pair.zero_grad(set_to_none=True)
    learner = Learner(pair, config, 0).to(config.device)
    optimiser = torch.optim.AdamW(parameter_groups(learner, config.weight_decay), lr=1e-9)
    towers = set(pair.parameters())
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            state = moments.get(parameter) or {
                "step": torch.tensor(0.0),
                "exp_avg": torch.full_like(parameter, 1e-12),
                "exp_avg_sq": torch.full_like(parameter, 1e-12),
            }
            optimiser.state[parameter] = state
            if parameter in towers:
                moments[parameter] = state
    return Ready(config, learner, optimiser, made_up_batch(config))


def made_up_batch(config: PretrainConfig) -> Batch:
    """Noise with captions that fill the context; boxes as a recipe with crops has them."""
    recipe, B, side = RECIPES[config.recipe], config.batch_size, config.image_size
    chance = torch.Generator().manual_seed(0)
    texts = [f"{number:03d} " + "x" * config.context for number in range(B)]
    captions = [(text,) for text in texts]
    num_views = len(recipe.views)
    small = side // recipe.teacher.shrink if recipe.teacher else side
    names, count_U = distinct(texts)
    box_B4 = torch.tensor([0, 0, side, side]).expand(B, 4)
    return Batch(
        ids=texts,
        captions=captions,
        texts=names,
        text_B=torch.arange(B),
        count_U=count_U,
        positive_BU=positives(captions, names),
        view_VBCHW=torch.randn(num_views, B, 3, side, side, generator=chance),
        box_VB4=box_B4.expand(num_views, B, 4),
        teacher_BCHW=torch.randn(B, 3, small, small, generator=chance) if recipe.teacher else None,
        teacher_box_B4=box_B4 if recipe.teacher else None,
    )


def step_seconds(ready: Ready) -> float:
    """Wall time of forward, backward, optimiser and teacher update of one step in the recipe's main part."""
    config, learner = ready.config, ready.learner
    views = config.row.views
    _finish(config.device)
    start = time.perf_counter()
    ready.optimiser.zero_grad(set_to_none=True)
    learner(ready.batch, views, 0.5, generator(0, "mask", 0, config.device))["loss"].backward()
    ready.optimiser.step()
    learner.follow(0)
    _finish(config.device)
    return time.perf_counter() - start


def peak_memory(config: PretrainConfig) -> int:
    """Peak bytes of this process (on a GPU: of its tensors) over two steps."""
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ready = build(config, towers_of(config), {})
    for _ in range(2):
        step_seconds(ready)
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def peak_resident() -> int:
    """Largest resident size of this process so far, bytes.

    Linux keeps the parent's peak in `ru_maxrss` when a process starts another; `VmHWM` begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    make = small_config if asked["small"] else vit_b_config
    print(json.dumps(peak_memory(make(asked["recipe"], asked["batch_size"], asked["device"]))))
