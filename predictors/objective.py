"""What one training step of a scorer computes, and how its current weights are judged."""

import torch
from torch import Tensor, nn

from patchrank.pretrain.distributed import ALONE, World
from patchrank.pretrain.draws import generator, sampler
from patchrank.pruned import PrunedTower, start_state
from patchrank.spec import PruneSpec
from predictors.cache import first
from predictors.config import TrainConfig
from predictors.fit import Task
from predictors.judging import judge, pruned_features
from predictors.losses import combine, feature_distance, needs_feature, parse_weights
from predictors.prepare import Images
from predictors.schedules import drawn
from predictors.smooth import Perturb, smooth_features


def with_spec(pruned: PrunedTower, spec: PruneSpec) -> PrunedTower:
    """The same parts under another spec."""
    return PrunedTower(pruned.tower, spec, pruned.scorer, pruned.added, pruned.metric)


def make_task(
    config: TrainConfig,
    pruned: PrunedTower,
    learned: nn.Module,
    images: Images,
    golden_nN: Tensor | None,
    counts: tuple[int, int],
    world: World = ALONE,
) -> Task:
    """The training of `pruned.scorer` and `pruned.added` at keep counts drawn from `counts`; judged at its own spec.

    Of every batch a process takes its part.
    """
    tokens, layer, judged = images.train, pruned.spec.cuts[0][0], first(images.held_out, config.judged)
    weights, own = parse_weights(config.loss), world.part(config.batch_size)

    def batch(step: int) -> Tensor:
        return sampler(len(tokens), config.batch_size, config.seed, step)[own]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index_B = batch(step)
        x_BLC, dense_BD = tokens.x_nLC[index_B], tokens.feature_nD[index_B]
        feature_BD, numbers = None, {}
        if needs_feature(weights):
            spec = drawn(pruned.spec, counts, pruned.config.num_patches, config.seed, step)
            perturb = Perturb(config.noise, generator(config.seed, "noise", step), own, config.batch_size)
            feature_BD, scores = smooth_features(with_spec(pruned, spec), x_BLC, layer, perturb)
            score_BN = scores[0]
        else:
            score_BN = pruned.scorer(start_state(pruned.tower, x_BLC, layer))
        golden_BN = None if golden_nN is None else golden_nN[index_B]
        total, terms = combine(
            weights, score_BN=score_BN, golden_BN=golden_BN, feature_BD=feature_BD, dense_BD=dense_BD
        )
        numbers |= {name: term.item() for name, term in terms.items()}
        if feature_BD is not None and (step + 1) % config.save_every == 0:
            numbers["relaxed"] = feature_distance(feature_BD, dense_BD).item()
            numbers["hard"] = hard_distance(with_spec(pruned, spec), x_BLC, dense_BD, layer)
        return total, numbers

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        return judge(pruned_features(pruned, judged, layer), judged, images.classify)

    return Task(
        learned=learned,
        loss=loss,
        judge=held_out,
        batch_name=lambda step: ", ".join(tokens.ids[i] for i in batch(step)[:4].tolist()) + ", ...",
    )


@torch.no_grad()
def hard_distance(pruned: PrunedTower, x_BLC: Tensor, dense_BD: Tensor, layer: int) -> float:
    """1 - cosine of inference's walk on the same batch, without noise: what `relaxed` must stay near."""
    return feature_distance(pruned.forward_from(x_BLC, layer), dense_BD).item()
