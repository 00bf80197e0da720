"""A pruned tower on disk comes back the same, through the table that the reader brings; other files do not."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tower
from safetensors.torch import load_file
from torch import Tensor, nn

from patchrank.atomic import sha256_of, write_tensors
from patchrank.checkpoints import weights_hash
from patchrank.errors import UserError
from patchrank.pruned import PrunedTower, State
from patchrank.saving import load_pruned, save_pruned
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec

GRID = (4, 4)
SPEC = PruneSpec(cuts=((1, 0.7), (2, 0.4)), where="inside", select="suppress", merge_norm="mean")


class Learned(nn.Module):
    """A scorer with weights and options, as predictors will bring them."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, state: State) -> Tensor:
        return self.linear(state.patches_BNC)[..., 0]


class Summary(nn.Module):
    """One added token: the mean of the patches, scaled."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, state: State, score_BN: Tensor, K: int) -> Tensor:
        return self.scale * state.patches_BNC.mean(1, keepdim=True)


TABLE = SCORERS | {"learned": Learned, "summary": Summary}


def saved(folder: Path) -> PrunedTower:
    pruned = PrunedTower(make_tower(), SPEC, SCORERS["random"](GRID, 3))
    save_pruned(folder, pruned, scorer="random", scorer_options={"seed": 3}, model="ViT-X", pretrained="here")
    return pruned


def edit(folder: Path, **changes) -> None:
    path = folder / "pruned.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    """Change the tensors and repair the checksum, as a careless tool would."""
    tensors = load_file(folder / "pruned.safetensors")
    change(tensors)
    write_tensors(folder / "pruned.safetensors", tensors)
    edit(folder, sha256=sha256_of(folder / "pruned.safetensors"))


def test_round_trip(tmp_path: Path, images: Tensor) -> None:
    pruned = saved(tmp_path)
    loaded = load_pruned(tmp_path, SCORERS)
    assert torch.equal(loaded(images), pruned(images))
    assert loaded.spec == SPEC and loaded.config == pruned.config
    assert not loaded.training and not any(value.requires_grad for value in loaded.parameters())
    assert {path.name for path in tmp_path.iterdir()} == {"pruned.safetensors", "pruned.json"}


def test_manifest_says_what_it_is(tmp_path: Path) -> None:
    pruned = saved(tmp_path)
    manifest = json.loads((tmp_path / "pruned.json").read_text())
    assert manifest["schema"] == 1 and manifest["backbone"]["model"] == "ViT-X"
    assert manifest["backbone"]["weights_hash"] == weights_hash(pruned.tower)
    assert PruneSpec.from_dict(manifest["spec"]) == SPEC
    assert manifest["scorer"] == {"row": "random", "options": {"seed": 3}} and manifest["added"] is None
    assert {"patchrank", "python", "torch"} <= manifest["versions"].keys()


@pytest.mark.parametrize("row", SCORERS)
def test_every_scorer_of_the_table(row: str, tmp_path: Path, images: Tensor) -> None:
    pruned = PrunedTower(make_tower(), SPEC, SCORERS[row](GRID))
    save_pruned(tmp_path, pruned, scorer=row)
    assert torch.equal(load_pruned(tmp_path, SCORERS)(images), pruned(images))


def test_learned_scorer_and_added_tokens_bring_their_weights(tmp_path: Path, images: Tensor) -> None:
    spec = PruneSpec(cuts=((1, 0.5),), num_added=1)
    pruned = PrunedTower(make_tower(), spec, Learned(GRID, 32), Summary(GRID)).eval()
    with torch.no_grad():
        pruned.added.scale.fill_(2.5)
    save_pruned(tmp_path, pruned, scorer="learned", scorer_options={"width": 32}, added="summary")
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path, TABLE)(images), pruned(images))
    with pytest.raises(UserError, match="scorer 'learned': must be a row of the given table; known: centre, "):
        load_pruned(tmp_path, SCORERS)


def test_half_precision_stays(tmp_path: Path) -> None:
    pruned = PrunedTower(make_tower().half(), SPEC, SCORERS["random"](GRID))
    save_pruned(tmp_path, pruned, scorer="random")
    assert {value.dtype for value in load_pruned(tmp_path, SCORERS).parameters()} == {torch.float16}


def test_added_part_and_its_row_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="added='summary': the tower has no added part"):
        save_pruned(
            tmp_path, PrunedTower(make_tower(), SPEC, SCORERS["random"](GRID)), scorer="random", added="summary"
        )
    pruned = PrunedTower(make_tower(), SPEC, SCORERS["random"](GRID), Summary(GRID))
    with pytest.raises(UserError, match="added=None: the tower has an added part"):
        save_pruned(tmp_path, pruned, scorer="random")
    assert not list(tmp_path.iterdir())


def drop_a_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["tower.blocks.0.fc1.bias"]


def add_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["tower.stray"] = torch.zeros(1)


def bend_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["tower.blocks.0.fc1.bias"] = torch.zeros(3)


def change_a_value(tensors: dict[str, Tensor]) -> None:
    tensors["tower.prefix"] += 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_a_tensor, "'tower.blocks.0.fc1.bias' is missing"),
        (add_a_tensor, "1 unknown keys: tower.stray"),
        (bend_a_tensor, r"shape \(3,\), must be \(64,\)"),
        (change_a_value, "must hold the weights"),
    ],
)
def test_other_tensors_are_refused(change, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=words):
        load_pruned(tmp_path, SCORERS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 99}, "schema 99: must be"),
        ({"kind": "something"}, "kind 'something'"),
        ({"sha256": "0" * 64}, "must have the checksum"),
        ({"spec": {"cuts": [[1, 0.5]], "speed": "fast"}}, "does not fit this version"),
        ({"backbone": {}}, "does not fit this version"),
        ({"scorer": {"row": "psychic", "options": {}}}, "'psychic': must be a row"),
        ({"scorer": {"row": "random", "options": {"speed": 1}}}, "'random': options .* do not fit"),
        ({"scorer": {}}, "scorer None: must be a row"),
        ({"spec": {"cuts": [[7, 0.5]]}}, "layer=7: outside"),
    ],
)
def test_other_manifests_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        load_pruned(tmp_path, SCORERS)


def test_damaged_and_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        load_pruned(tmp_path, SCORERS)
    saved(tmp_path)
    data = (tmp_path / "pruned.safetensors").read_bytes()
    (tmp_path / "pruned.safetensors").write_bytes(data[:-1])
    with pytest.raises(UserError, match="must have the checksum"):
        load_pruned(tmp_path, SCORERS)
    (tmp_path / "pruned.safetensors").unlink()
    with pytest.raises(UserError, match="must have the checksum"):
        load_pruned(tmp_path, SCORERS)
    (tmp_path / "pruned.json").write_text("[1]")
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        load_pruned(tmp_path, SCORERS)
