"""Closed-form multiply-accumulate counts of dense and pruned towers. 1 MAC = 2 FLOP; per image, image tower only.

Counts every matrix product (patch embedding, projections, attention, MLP, pooling, scorer, fold); elementwise work
is left out, as `torch.utils.flop_counter` does, against which the formulas are tested on the meta device.
"""

from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig


def block_macs(config: TowerConfig, num_tokens: int, num_rows: int | None = None) -> int:
    """One block on `num_tokens` tokens; `num_rows` limits the queries (None: all)."""
    rows = num_tokens if num_rows is None else num_rows
    return attention_macs(config, num_tokens, rows) + mlp_macs(config, rows)


def attention_macs(config: TowerConfig, num_tokens: int, num_rows: int) -> int:
    """Attention half: q and output for `num_rows`, k and v for all, and the two products with the attention matrix."""
    width = config.width
    return 2 * width * width * (num_rows + num_tokens) + 2 * num_rows * num_tokens * width


def mlp_macs(config: TowerConfig, num_tokens: int) -> int:
    """MLP half."""
    return 2 * config.width * config.mlp_width * num_tokens


def embed_macs(config: TowerConfig) -> int:
    """Patch embedding."""
    return 3 * config.patch_size**2 * config.width * config.num_patches


def head_macs(config: TowerConfig, num_tokens: int) -> int:
    """Pooling and projection."""
    pool = 0
    if config.pool == "attention":
        width = config.width
        pool = 2 * width * width * (1 + num_tokens) + 2 * num_tokens * width + 2 * width * config.mlp_width
    return pool + config.width * (config.output_dim or 0)


def finish_macs(config: TowerConfig, num_tokens: int, start: int) -> int:
    """Blocks `start` .. end and the head on `num_tokens` tokens; the last block reads one row if it may."""
    last = config.num_layers - 1
    if config.pool != "class" or start > last:
        blocks = (config.num_layers - start) * block_macs(config, num_tokens)
    else:
        blocks = (last - start) * block_macs(config, num_tokens) + block_macs(config, num_tokens, 1)
    return blocks + head_macs(config, num_tokens)


def dense_macs(config: TowerConfig, *, class_row_only: bool = True) -> int:
    """The unpruned tower; `class_row_only=False` counts the last block in full, as papers do."""
    num_tokens = config.num_prefix + config.num_patches
    if class_row_only:
        return embed_macs(config) + finish_macs(config, num_tokens, 0)
    return embed_macs(config) + config.num_layers * block_macs(config, num_tokens) + head_macs(config, num_tokens)


def patches_at_cuts(config: TowerConfig, spec: PruneSpec) -> list[int]:
    """Patches present at each cut of a walk; a last block that computes only the class row has no cut inside."""
    last = config.num_layers - 1
    done = [layer for layer, _ in spec.cuts if spec.where == "before" or config.pool != "class" or layer < last]
    return [config.num_patches, *(K for _, K in spec.counts(config.num_patches))][: len(done)]


def cut_macs(
    config: TowerConfig, spec: PruneSpec, num_tokens: int, num_patches: int, K: int, metric_dim: int | None = None
) -> int:
    """The cut itself: fold metric (keys are free inside a block), similarities, merge; nothing for drop with topk.

    Args: metric_dim: channels of a learned metric, projected from the patches; None: the block's keys.
    """
    macs = 0
    if spec.rest == "fold" or spec.covers:
        if metric_dim is not None:
            macs += num_patches * config.width * metric_dim
        elif spec.where == "before":
            macs += num_tokens * config.width * config.width
    metric_dim = config.width // config.num_heads if metric_dim is None else metric_dim
    if spec.covers:
        macs += num_patches * num_patches * metric_dim
    if spec.rest == "fold":
        rest = num_patches - K
        macs += rest * K * (metric_dim + config.width)
        macs += rest * K if spec.merge_norm == "preserve" else 0
    return macs


def pruned_macs(
    config: TowerConfig,
    spec: PruneSpec,
    *,
    scorer: int = 0,
    metric_dim: int | None = None,
    class_row_only: bool = True,
) -> int:
    """The pruned tower, cuts included.

    Args: `scorer`: MACs of all scorer and compensation calls together; metric_dim as in `cut_macs`.
    """
    spec.check_layers(config.num_layers)
    cuts = dict(spec.counts(config.num_patches))
    patches, prefix = config.num_patches, config.num_prefix
    last = config.num_layers - 1
    total = embed_macs(config) + scorer
    for layer in range(config.num_layers):
        rows_only = class_row_only and layer == last and config.pool == "class"
        before = prefix + patches
        if layer not in cuts or (rows_only and spec.where == "inside"):
            total += block_macs(config, before, 1 if rows_only else None)
            continue
        total += cut_macs(config, spec, before, patches, cuts[layer], metric_dim)
        patches = cuts[layer]
        prefix += spec.num_added if layer == spec.cuts[0][0] else 0
        if spec.where == "before":
            total += block_macs(config, prefix + patches, 1 if rows_only else None)
        else:
            total += attention_macs(config, before, before) + mlp_macs(config, prefix + patches)
    return total + head_macs(config, prefix + patches)
