"""Learned scorers: small attention-free networks on the tokens at the cut; (State) -> score (B, N) float32.

One scorer serves every keep rate (a ranking is nested) and every cut of a schedule (it is asked again on what is left).
A scorer may bring its own fold metric, a projection of the same normalised tokens; `PrunedTower` finds it as `metric`.

Letters: B batch, P prefix tokens, N patches present, G all patches of the grid, L = P + N, C width, M metric channels.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.linear import Linear
from patchrank.pruned import State
from patchrank.salient import POWER, SHARPNESS, class_share

_START = 0.02
"""Scale of the first output weights: training starts near the random prior, the best of the untrained priorities."""


def normalised(x_BLC: Tensor) -> Tensor:
    """Tokens with mean 0 and variance 1 over the channels; no weights, so it costs no matrix product."""
    return F.layer_norm(x_BLC, x_BLC.shape[-1:])


def mean_patch(x_BNC: Tensor, size_BN: Tensor | None) -> Tensor:
    """Mean over the patches (B, 1, C), each counted by the number of patches it stands for."""
    if size_BN is None:
        return x_BNC.mean(1, keepdim=True)
    weight_B1N = (size_BN / size_BN.sum(1, keepdim=True)).unsqueeze(1)
    return (weight_B1N.mT * x_BNC).sum(1, keepdim=True)


def standardise(score_BN: Tensor) -> Tensor:
    """Scores with mean 0 and variance 1 over the patches of each image: the form in which losses see them.

    Neither scale nor offset of the raw scores matters then, so no loss can be escaped by shrinking them.
    """
    centred_BN = score_BN - score_BN.mean(-1, keepdim=True)
    return centred_BN / centred_BN.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


class LearnedScorer(nn.Module, ABC):
    """What all learned scorers share: their grid and, if wanted, a fold metric and merge weights of their own.

    Args: grid (rows, columns); width C; has_class: whether token 0 is a class token; metric_dim M, 0 for none;
    weighted: let a patch count exp(b z) in a merged token, z its standardised score, b learned (0 at first, more with
    salient); salient: add the class token's attention to the score, a log times a learned power (one row of queries,
    fused attention stays on); start: scale of the first scores, where their scale matters (`cover`).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        width: int,
        has_class: bool = True,
        metric_dim: int = 0,
        weighted: bool = False,
        salient: bool = False,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.width = width
        self.has_class = has_class
        self.metric_dim = metric_dim
        self.project = Linear(width, metric_dim) if metric_dim else None
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS if salient else 0.0)) if weighted else None
        self.power = nn.Parameter(torch.tensor(POWER)) if salient else None
        self.start = start

    def saliency(self, state: State) -> Tensor | float:
        """What `salient` adds to the score, (B, N); 0 without it."""
        if self.power is None:
            return 0.0
        return self.power * class_share(state).clamp_min(1e-8).log()

    @property
    def metric(self):
        """(State) -> (B, N, M) float for `PrunedTower`; None where the block's keys shall decide."""
        return None if self.project is None else self._metric

    @property
    def merge_weight(self):
        """score (B, N) -> weight (B, N) of each patch in a merged token; None where all count alike."""
        return None if self.sharpness is None else self._merge_weight

    def _merge_weight(self, score_BN: Tensor) -> Tensor:
        return (self.sharpness * standardise(score_BN)).exp()

    def _metric(self, state: State) -> Tensor:
        return self.project(normalised(state.patches_BNC))

    @torch.no_grad()
    def start_from_tokens(self, x_BNC: Tensor) -> None:
        """Let the metric begin as the strongest directions of normalised tokens (B, N, C), uncentred."""
        if self.project is None:
            return
        unit_BNC = F.normalize(normalised(x_BNC), dim=-1)
        direction_CC = torch.linalg.eigh(torch.einsum("bnc,bnd->cd", unit_BNC, unit_BNC)).eigenvectors.flip(1)
        self.project.weight.zero_()[: self.width].copy_(direction_CC[:, : self.metric_dim].T)
        self.project.bias.zero_()

    @abstractmethod
    def forward(self, state: State) -> Tensor:
        """Score (B, N) float32, higher = keep."""

    @abstractmethod
    def macs(self, num_patches: int) -> int:
        """Multiply-accumulates of one call on `num_patches` patches, without the metric (`cut_macs` counts it) and the
        class attention (`patchrank.salient.share_macs`)."""


class LinearScorer(LearnedScorer):
    """A weight per channel and a learned position prior."""

    def __init__(self, grid: tuple[int, int], **shared) -> None:
        super().__init__(grid, **shared)
        self.out = Linear(self.width, 1)
        nn.init.normal_(self.out.weight, std=_START * self.start)
        self.prior_G = nn.Parameter(self.start * torch.randn(self.num_patches))

    def forward(self, state: State) -> Tensor:
        score_BN = self.out(normalised(state.patches_BNC)).squeeze(-1)
        return (score_BN + self.prior_G[state.position_BN] + self.saliency(state)).float()

    def macs(self, num_patches: int) -> int:
        return num_patches * self.width


class MlpScorer(LearnedScorer):
    """One hidden layer on patch, class token and mean patch, and a learned position prior.

    Args: hidden: width of the hidden layer; None: a quarter of the tower's width.
    """

    def __init__(self, grid: tuple[int, int], *, hidden: int | None = None, **shared) -> None:
        super().__init__(grid, **shared)
        self.hidden = max(4, self.width // 4) if hidden is None else hidden
        self.patch = Linear(self.width, self.hidden)
        self.mean = Linear(self.width, self.hidden, bias=False)
        self.token = Linear(self.width, self.hidden, bias=False) if self.has_class else None
        self.out = Linear(self.hidden, 1)
        nn.init.normal_(self.out.weight, std=_START * self.start)
        self.prior_G = nn.Parameter(self.start * torch.randn(self.num_patches))

    def forward(self, state: State) -> Tensor:
        x_BLC = normalised(state.x_BLC)
        patches_BNC = x_BLC[:, state.num_prefix :]
        hidden_BNH = self.patch(patches_BNC) + self.mean(mean_patch(patches_BNC, state.size_BN))
        if self.token is not None:
            hidden_BNH = hidden_BNH + self.token(x_BLC[:, :1])
        score_BN = self.out(F.gelu(hidden_BNH)).squeeze(-1)
        return (score_BN + self.prior_G[state.position_BN] + self.saliency(state)).float()

    def macs(self, num_patches: int) -> int:
        context = 1 + self.has_class
        return (num_patches + context) * self.width * self.hidden + num_patches * self.hidden


class MixerScorer(LearnedScorer):
    """The paper's predictor: mix channels, then patches, both with residual; the score is the mean over channels.

    Its patch mixing belongs to one grid in raster order, so it serves a single cut.
    Args: channels that neighbouring channels are averaged down to (as the published code does); None: a sixth of C.
    Source: Patch Ranking, section 3.2: each mixing is a fully connected layer, LayerNorm and GELU. Deviations: tokens
    are normalised first; the class token is left out (the paper does not mention it, the code includes it).
    """

    def __init__(self, grid: tuple[int, int], *, channels: int | None = None, **shared) -> None:
        super().__init__(grid, **shared)
        self.channels = max(4, self.width // 6) if channels is None else channels
        self.mix_channels = Linear(self.channels, self.channels)
        self.norm_channels = nn.LayerNorm(self.channels)
        self.mix_patches = Linear(self.num_patches, self.num_patches)
        self.norm_patches = nn.LayerNorm(self.num_patches)

    def forward(self, state: State) -> Tensor:
        """Raises: ValueError if patches are missing, as behind a first cut."""
        if state.x_BLC.shape[1] - state.num_prefix != self.num_patches:
            raise ValueError("mixer: its weights belong to the whole grid; use one cut, or linear or mlp for several")
        x_BNC = F.adaptive_avg_pool1d(normalised(state.patches_BNC), self.channels)
        x_BNC = x_BNC + F.gelu(self.norm_channels(self.mix_channels(x_BNC)))
        x_BCN = x_BNC.mT + F.gelu(self.norm_patches(self.mix_patches(x_BNC.mT)))
        return (x_BCN.mean(1) + self.saliency(state)).float()

    def macs(self, num_patches: int) -> int:
        return num_patches * self.channels**2 + self.channels * num_patches**2


class TextSimilarityScorer(LearnedScorer):
    """How much a patch looks like its best class: largest cosine to the class matrix, and a position prior.

    `start_from` fills in a tower's own map into the feature space and a class matrix; the map is trained from there.
    Args: feature_dim D; num_classes Y.
    """

    def __init__(self, grid: tuple[int, int], *, feature_dim: int, num_classes: int, **shared) -> None:
        super().__init__(grid, **shared)
        self.map = Linear(self.width, feature_dim)
        self.register_buffer("class_DY", torch.zeros(feature_dim, num_classes))
        self.prior_G = nn.Parameter(self.start * torch.randn(self.num_patches))

    @torch.no_grad()
    def start_from(self, tower: nn.Module, class_DY: Tensor) -> "TextSimilarityScorer":
        """Begin as the tower's final LayerNorm and projection; unit columns of `class_DY` (D, Y)."""
        gain_C = getattr(tower.norm, "weight", torch.ones(self.width))
        shift_C = getattr(tower.norm, "bias", torch.zeros(self.width))
        weight_DC = tower.proj.weight if isinstance(tower.proj, nn.Linear) else torch.eye(self.width)
        offset_D = tower.proj.bias if isinstance(tower.proj, nn.Linear) and tower.proj.bias is not None else 0.0
        self.map.weight.copy_(weight_DC * gain_C)
        self.map.bias.copy_(weight_DC @ shift_C + offset_D)
        self.class_DY.copy_(F.normalize(class_DY, dim=0))
        return self

    def forward(self, state: State) -> Tensor:
        feature_BND = F.normalize(self.map(normalised(state.patches_BNC)), dim=-1)
        score_BN = (feature_BND @ self.class_DY).amax(-1)
        return (score_BN + self.prior_G[state.position_BN] + self.saliency(state)).float()

    def macs(self, num_patches: int) -> int:
        return num_patches * self.class_DY.shape[0] * (self.width + self.class_DY.shape[1])
