"""ToFu: Token Fusion, pruning in early blocks and norm-preserving merging (MLERP) in late ones; training-free.

Source: Kim et al. 2024, "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", sections 3.2 and 3.3:
pairs are found as ToMe finds them; in early blocks, which are far from linear, the token of A is dropped and its host
stays as it is; in late ones both become one token in the direction of their mean with the largest of their norms.
Deviations: early is the lower half of the blocks (the paper chooses the depth per model); means are weighted by size
and sizes bias the attention as in ToMe, for dropped tokens they do not count. The authors published no code; the
version in PiToMe's repository has neither sizes nor an exact norm, and loses by it on a frozen tower (docs/rivals.md).

Letters: as in `eval.rivals.tome`.
"""

from torch import Tensor

from eval.rivals.tome import Match, ToMe, merge, prefix_first, r_at
from patchrank.tokens import gather_tokens
from patchrank.tower import VisionTower


def drop_merged(x_BLC: Tensor, size_BL: Tensor, matched: Match, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L - r, C) and sizes without the merged ones; their hosts stay as they are."""
    _, left_BU, _ = matched
    tokens = prefix_first(gather_tokens(x_BLC[:, ::2], left_BU), x_BLC[:, 1::2], num_prefix)
    return tokens, prefix_first(size_BL[:, ::2].gather(1, left_BU), size_BL[:, 1::2], num_prefix)


def mlerp(x_BLC: Tensor, size_BL: Tensor, matched: Match, num_prefix: int) -> tuple[Tensor, Tensor]:
    """As ToMe's merging, then every merged token is scaled to the largest norm of its members."""
    merged_BR, left_BU, host_BR = matched
    tokens_BLC, size_BL = merge(x_BLC, size_BL, matched, num_prefix)
    norm_BA, norm_BX = x_BLC[:, ::2].norm(dim=-1), x_BLC[:, 1::2].norm(dim=-1)
    largest_BX = norm_BX.scatter_reduce(1, host_BR, norm_BA.gather(1, merged_BR), "amax")
    target_BL = prefix_first(norm_BA.gather(1, left_BU), largest_BX, num_prefix)
    scale_BL = target_BL / tokens_BLC.norm(dim=-1).clamp_min(1e-6)
    return tokens_BLC * scale_BL.unsqueeze(-1), size_BL


class ToFu(ToMe):
    """ToMe's matching; what becomes of a pair depends on the depth."""

    def join(self, layer: int, x_BLC: Tensor, size_BL: Tensor, matched: Match) -> tuple[Tensor, Tensor]:
        config = self.tower.config
        act = drop_merged if layer < config.num_layers // 2 else mlerp
        return act(x_BLC, size_BL, matched, config.num_prefix)


class Mlerp(ToMe):
    """Norm-preserving merging in every block."""

    def join(self, layer: int, x_BLC: Tensor, size_BL: Tensor, matched: Match) -> tuple[Tensor, Tensor]:
        return mlerp(x_BLC, size_BL, matched, self.tower.config.num_prefix)


def build(tower: VisionTower, macs: float) -> ToMe:
    """ToFu in all blocks at a budget. Raises: UserError for a budget out of reach."""
    return r_at(tower, macs, 0, 11, rival=ToFu)


def build_mlerp(tower: VisionTower, macs: float, *, first: int = 0, last: int = 11) -> ToMe:
    """MLERP merging in blocks `first` .. `last` of 12 at a budget. Raises: UserError for a budget out of reach."""
    return r_at(tower, macs, first, last, rival=Mlerp)
