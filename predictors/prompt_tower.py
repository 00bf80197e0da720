"""The paper's prompts as a module: learned text tokens P_t, and visual tokens M P_t at the input of the image tower.

Source: Patch Ranking, section 3.3: 16 text tokens, 16 visual ones tied to them by one matrix M, frozen towers,
cross-entropy on 16 labelled images a class. Deviation: none known; the paper names neither optimiser nor schedule.

Letters: T tokens, C width of the image tower, E width of the text tower, B batch, D feature.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower


class Prompt(nn.Module):
    """P_t (T, E), and with `width` M (C, E)."""

    def __init__(self, start_TE: Tensor, width: int | None, seed: int) -> None:
        super().__init__()
        self.text_TE = nn.Parameter(start_TE.clone())
        self.map_CE = None
        if width is not None:
            generator = torch.Generator().manual_seed(seed)
            scale = start_TE.shape[1] ** -0.5
            map_CE = scale * torch.randn(width, start_TE.shape[1], generator=generator)
            self.map_CE = nn.Parameter(map_CE.to(start_TE.device))

    def visual(self) -> Tensor:
        """P_v = M P_t, (T, C). Raises: ValueError for a prompt of text tokens only."""
        if self.map_CE is None:
            raise ValueError("visual: this prompt has text tokens only")
        return self.text_TE @ self.map_CE.T


def with_tokens(tower: VisionTower, token_TC: Tensor) -> VisionTower:
    """The same tower with T more prefix tokens, frozen; all other weights are shared with it."""
    with torch.device("meta"):
        found = VisionTower(replace(tower.config, num_prefix=tower.config.num_prefix + len(token_TC)))
    prefix_QC = torch.cat([tower.prefix.detach(), token_TC.detach().to(tower.prefix.dtype)])
    found.load_state_dict(tower.state_dict() | {"prefix": prefix_QC}, assign=True)
    return found.eval().requires_grad_(False)


def prompted_feature(roomy: VisionTower | PrunedTower, prompt: Prompt, image_BCHW: Tensor) -> Tensor:
    """Feature (B, D) with the prompt's visual tokens in place of the last T prefix tokens; differentiable in it."""
    pruned = isinstance(roomy, PrunedTower)
    prefix_QC, visual_TC = (roomy.tower if pruned else roomy).prefix, prompt.visual()
    whole_QC = torch.cat([prefix_QC[: len(prefix_QC) - len(visual_TC)], visual_TC.to(prefix_QC.dtype)])
    return functional_call(roomy, {"tower.prefix" if pruned else "prefix": whole_QC}, (image_BCHW,))
