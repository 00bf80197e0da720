"""`python -m eval golden-match`: does a scorer choose the patches that the golden ranking puts first, or as good ones?

The overlap of both keep sets is corrected for chance (0 = a random set, 1 = the same set). Static position explains
much of such overlaps, so the mean golden rank of every position, over the other images, stands beside the scorers.
Other sets can serve as well: headroom is where a set's cosine lies between the best free scorer's (0) and golden (1);
the selection of `patchrank.apply` has a row of its own and is no such baseline.

Letters: I images, B batch, N patches, K kept, M quantities, R bootstrap draws.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from eval.quality import recovered_headroom
from eval.tables import as_text
from patchrank.atomic import write_json
from patchrank.data import batches, load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.metrics import interval, resampled_means
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.salient import SALIENT, Salient
from patchrank.scorers import SCORERS
from patchrank.search.plan import threads
from patchrank.search.store import RankingStore, open_store
from patchrank.spec import PruneSpec
from patchrank.tokens import num_keep
from predictors import load_pruned, read_training

GOLDEN = "golden"
"""The row of the store's own order: an oracle."""
MEAN_RANK = "mean-rank"
"""The row of the position alone."""
SUPPRESS = "suppress"
"""The row of a covering selection with random priorities."""
_PREFIX = "trained: "


@dataclass(frozen=True, kw_only=True)
class GoldenMatchConfig:
    """How well trained and free scorers find the patches of a golden ranking, corrected for chance."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data. The store says which set and split."""
    store: Path = Path("out/search")
    """Golden rankings: a folder that python -m patchrank.search wrote, of images that no scorer was trained on."""
    partial: bool = False
    """Accept a store that is not finished."""
    trained: tuple[Path, ...] = ()
    """Folders of predictors.train; their scorers choose at the store's cut."""
    keep: float = 100 / 196
    """Share of the patches that both keep; the papers compare the first 100 of 196."""
    limit: int | None = None
    """Images, the first of the store. None: all."""
    batch_size: int = 16
    """Images per call."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    out: Path = Path("out/golden-match")
    """Folder of golden_match.json."""


def main(config: GoldenMatchConfig) -> None:
    """Compare the keep sets of every scorer with the golden ones, write and print the rows."""
    if not 0.0 < config.keep < 1.0:
        raise UserError(f"--keep {config.keep:g}: must lie between 0 and 1; 0.51 compares the better half")
    with threads(config.threads), torch.inference_mode():
        clip = load_clip(config.model, config.pretrained, config.device)
        store = open_store(config.store, weights_hash=clip.weights_hash, partial=config.partial)
        K = num_keep(config.keep, store.request["num_patches"])
        found = measure(config, clip, store)
    taught = {_PREFIX + folder.name for folder in config.trained if learned_rankings(read_training(folder))}
    rows = rows_of(found, taught)
    said = ("data", "split", "layer", "rest", "criterion", "strategy", "num_patches")
    report = {
        "command": command("eval"),
        "versions": versions(),
        "machine": machine(),
        "settings": {"model": Path(config.model).name, "keep": config.keep, "K": K}
        | {name: store.request[name] for name in said},
        "num_images": len(found[MEAN_RANK].match_I),
        "chance": K / store.request["num_patches"],
        "rows": rows,
    }
    write_json(config.out / "golden_match.json", report)
    shown = ("match", "minus_mean_rank", "cosine", "headroom")
    lines = [[row["method"], *(_cell(row, name) for name in shown)] for row in rows]
    print(as_text(["method", "match beyond chance", "minus mean rank", "cosine", "golden headroom"], lines))
    print(f"{report['num_images']} images, first {K} patches; golden_match.json in {config.out}")


def corrected_overlap(keep_BK: Tensor, golden_BK: Tensor, num_patches: int) -> Tensor:
    """Overlap of two keep sets of every image (B,): 1 for equal sets, 0 for what chance gives, below it if avoided."""
    K = keep_BK.shape[1]
    overlap_B = (keep_BK.unsqueeze(2) == golden_BK.unsqueeze(1)).any(-1).double().mean(1)
    return (overlap_B - K / num_patches) / (1 - K / num_patches)


def others_mean(golden_IN: Tensor) -> Tensor:
    """Mean golden score of every position over all other images (I, N). Raises: UserError for fewer than two images."""
    if len(golden_IN) < 2:
        raise UserError("the store holds fewer than two images; the mean rank of the others needs more")
    return (golden_IN.sum(0) - golden_IN) / (len(golden_IN) - 1)


def learned_rankings(record: dict) -> bool:
    """Whether a scorer's training read golden rankings, by the record that `predictors.train` leaves."""
    return record.get("training", {}).get("store") is not None


def choosers(config: GoldenMatchConfig, clip: LoadedClip, store: RankingStore) -> dict[str, PrunedTower]:
    """Name -> a tower with one cut where the store has its own, whose keep set is compared."""
    layer, rest = store.request["layer"], store.request["rest"]
    spec = PruneSpec(cuts=((layer, config.keep),), rest=rest, select="topk")
    found = {}
    for folder in config.trained:
        record = read_training(folder)
        if record["source_weights_hash"] != clip.weights_hash:
            raise UserError(f"--trained {folder}: was trained for other weights; train it for this model")
        saved = load_pruned(folder, config.device)
        own = replace(saved.spec, cuts=spec.cuts, rest=rest, num_added=0)
        found[_PREFIX + folder.name] = PrunedTower(saved.tower, own, saved.scorer)
    names = [name for name in SCORERS if name != "class-attention" or clip.tower.config.num_prefix]
    tower, grid = clip.tower, clip.tower.config.grid
    free = {name: PrunedTower(tower, spec, SCORERS[name](grid)) for name in names}
    free[SUPPRESS] = PrunedTower(tower, replace(spec, select="suppress"), SCORERS["random"](grid))
    free[SALIENT] = PrunedTower(tower, replace(spec, select="cover"), Salient(tower.config.num_prefix > 0))
    return {name: pruned.eval() for name, pruned in (found | free).items()}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One row on the images of the store, in its order."""

    match_I: Tensor
    """Corrected overlap with the golden set."""
    cosine_I: Tensor
    """Cosine of the feature to the unpruned one."""


def measure(config: GoldenMatchConfig, clip: LoadedClip, store: RankingStore) -> dict[str, Found]:
    """What every row keeps and what that is worth."""
    dataset = load_dataset(store.request["data"], root=config.data_root, split=store.request["split"])
    items = {item.id: item for item in dataset.images}
    absent = [image_id for image_id in store.ids if image_id not in items]
    if absent:
        raise UserError(f"--store {config.store}: ranks {absent[0]}, which this data set lacks; give its --data-root")
    wanted = store.ids[: config.limit]
    dataset, towers = replace(dataset, images=[items[image_id] for image_id in wanted]), choosers(config, clip, store)
    num_patches, golden_BN = store.request["num_patches"], store.order_BN.long()
    K = num_keep(config.keep, num_patches)
    score_BN = num_patches - 1.0 - golden_BN.argsort(dim=1)
    # A given score takes the place of the tower's own scorer.
    given = {GOLDEN: score_BN, MEAN_RANK: others_mean(score_BN)}
    towers |= dict.fromkeys(given, towers["random"])
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in towers}
    with tqdm(total=len(wanted), desc="golden-match", unit="image") as bar:
        for ids, image_BCHW, _ in batches(dataset, clip.preprocess, config.batch_size):
            row_B, image_BCHW = store.index(ids), image_BCHW.to(config.device)
            dense_BD = clip.tower(image_BCHW)
            for name, pruned in towers.items():
                told_BN = given[name][row_B].to(config.device) if name in given else None
                feature_BD, cuts = pruned.features_and_cuts(pruned.tower.embed(image_BCHW), 0, told_BN)
                match_B = corrected_overlap(cuts[0].keep_BK.cpu(), golden_BN[row_B, :K], num_patches)
                parts[name].append((match_B, F.cosine_similarity(feature_BD, dense_BD, dim=-1).double().cpu()))
            bar.update(len(ids))
    columns = {name: [torch.cat(column) for column in zip(*found)] for name, found in parts.items()}
    return {name: Found(match_I=match_I, cosine_I=cosine_I) for name, (match_I, cosine_I) in columns.items()}


def rows_of(found: dict[str, Found], taught: set[str]) -> list[dict]:
    """Means and 95 % bootstrap intervals over images; headroom is None where golden is no better than the best free.

    Args: taught: names of rows that were trained on golden rankings.
    """
    free = [name for name in found if name not in (GOLDEN, SALIENT) and not name.startswith(_PREFIX)]
    best = max(free, key=lambda name: found[name].cosine_I.mean().item())
    prior_I, free_I, golden_I = found[MEAN_RANK].match_I, found[best].cosine_I, found[GOLDEN].cosine_I
    rows = []
    for name, one in found.items():
        columns = {"match": one.match_I, "minus_mean_rank": one.match_I - prior_I, "cosine": one.cosine_I}
        mean_RM = resampled_means(torch.stack(list(columns.values()), dim=1))
        row = {"method": name, "trained": name.startswith(_PREFIX), "from_rankings": name in taught}
        for (column, value_I), mean_R in zip(columns.items(), mean_RM.T):
            row |= {column: value_I.mean().item(), f"{column}_interval": list(interval(mean_R))}
        room = recovered_headroom(one.cosine_I, free_I, golden_I)
        row |= {"best_free": name == best, "headroom": room.quality, "headroom_interval": room.quality_interval}
        rows.append(row)
    return rows


def _cell(row: dict, name: str) -> str:
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:+.3f} [{low:+.3f}, {high:+.3f}]"
