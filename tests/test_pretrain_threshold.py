"""E-CLIP's threshold: searched for once, on the first batches, kept by the run, and told."""

import json
from dataclasses import replace

import pytest
import torch
from pretrain_pairs import tiny, write_pairs

from patchrank.errors import UserError
from patchrank.pretrain import threshold
from patchrank.pretrain.__main__ import main
from patchrank.pretrain.distributed import World
from patchrank.pretrain.draws import generator
from patchrank.pretrain.loop import open_run, save, state_path, train_step
from patchrank.pretrain.maskers import MaskContext, MaskSpec, Selection, encode_masked, mask
from patchrank.pretrain.masking.cluster import ClusterMasker
from patchrank.pretrain.rules import check


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def eclip(pairs, out, **changes):
    return tiny(pairs, out, **(dict(recipe="eclip", num_steps=4, num_warmup=1, batch_size=8) | changes))


def scores(run) -> torch.Tensor:
    """Of the pictures that the search looks at."""
    found = []
    for step in range(threshold.NUM_BATCHES):
        image_BCHW, chance = run.batches.at(step).view_VBCHW[0], generator(0, "threshold", step)
        found.append(ClusterMasker()(MaskContext(image_BCHW=image_BCHW, patch_size=8, generator=chance)))
    return torch.cat(found)


def test_half_of_the_patches_lie_above_it_and_the_bounds_hold(pairs, tmp_path):
    run = open_run(eclip(pairs, tmp_path))
    score_BN = scores(run)
    assert score_BN.shape == (32, 16)
    assert float((score_BN > -run.config.threshold).float().mean()) == pytest.approx(0.5, abs=1 / 512)
    spec = run.config.row.views[0].mask
    assert (spec.threshold, spec.mean_keep) == (-run.config.threshold, None)
    batch = run.batches.at(4)
    share = threshold.kept_share(run.config, batch)
    assert 1 / 16 <= share <= 11 / 16 and spec.num_kept((4, 4)) == 11
    high, low = (threshold.kept_share(replace(run.config, threshold=value), batch) for value in (1.0, -1.0))
    assert (high, low) == (11 / 16, 1 / 16)


def test_it_depends_on_the_data_and_the_seed_alone(pairs, tmp_path, monkeypatch):
    first = open_run(eclip(pairs, tmp_path)).config.threshold
    assert open_run(eclip(pairs, tmp_path, accumulate=2, workers=2, width=64)).config.threshold == first
    assert open_run(eclip(pairs, tmp_path, seed=1)).config.threshold != first
    # a process that does not lead searches for nothing and takes the sum over all
    monkeypatch.setattr(threshold, "_search", lambda *_: pytest.fail("searched"))
    monkeypatch.setattr(threshold, "sum_over_ranks", lambda value, device: value + first)
    config = eclip(pairs, tmp_path)
    told = threshold.with_threshold(config, None, state_path(tmp_path), World(1, 2), "cpu")
    assert told == replace(config, threshold=first)


def test_a_run_that_goes_on_has_the_same_threshold_and_the_same_weights(pairs, tmp_path, monkeypatch):
    whole = open_run(eclip(pairs, tmp_path / "whole"))
    for step in range(4):
        train_step(whole, step)
    run = open_run(eclip(pairs, tmp_path / "parts"))
    for step in range(2):
        train_step(run, step)
    save(run)
    monkeypatch.setattr(threshold, "_search", lambda *_: pytest.fail("searched again"))
    again = open_run(eclip(pairs, tmp_path / "parts"))
    assert again.config.threshold == run.config.threshold and again.progress.step == 2
    for step in range(2, 4):
        train_step(again, step)
    found, expected = again.learner.state_dict(), whole.learner.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match="holds a run with --threshold 0"):
        open_run(eclip(pairs, tmp_path / "parts", threshold=-0.5))


def test_the_dry_run_and_the_config_on_disk_tell_it(pairs, tmp_path, capsys):
    main(eclip(pairs, tmp_path, dry_run=True))
    value = open_run(eclip(pairs, tmp_path)).config.threshold
    said = capsys.readouterr().out
    assert f"threshold {value:.4f}: " in said and "50 % on average, at most 70 % of a picture" in said
    main(eclip(pairs, tmp_path, num_steps=1, num_warmup=0, threshold=0.25))
    assert "threshold 0.2500: " in capsys.readouterr().out
    for name, place in (("config.json", []), ("clip.json", ["recipe", "settings"])):
        found = json.loads((tmp_path / name).read_text())
        for key in place:
            found = found[key]
        assert found["threshold"] == 0.25


def test_only_eclip_s_own_masks_have_one(pairs, tmp_path):
    for changes in (dict(recipe="flip50"), dict(masker="random")):
        with pytest.raises(UserError, match=r"--threshold 0\.5: only the masks of --recipe eclip"):
            check(replace(eclip(pairs, tmp_path), threshold=0.5, **changes))
    with pytest.raises(UserError, match=r"must lie in \[-1, 1\]"):
        check(eclip(pairs, tmp_path, threshold=2.0))
    with pytest.raises(UserError, match="between least and keep"):
        MaskSpec(keep=0.5, least=0.1, mean_keep=0.7)
    other = eclip(pairs, tmp_path, masker="pgs")
    assert other.row.views[0].mask == MaskSpec(masker="pgs", keep=0.5) and not threshold.is_open(other)
    open_spec = eclip(pairs, tmp_path).row.views[0].mask
    context = MaskContext(image_BCHW=torch.zeros(1, 3, 32, 32), patch_size=8, generator=torch.Generator())
    with pytest.raises(ValueError, match="no threshold yet"):
        mask(open_spec, context)


def test_padding_of_a_bounded_mask_is_blocked_in_training_too(pairs, tmp_path):
    run = open_run(eclip(pairs, tmp_path))
    batch, view, tower = run.batches.at(0), run.config.row.views[0], run.pair.tower
    image_BCHW, chance = batch.view_VBCHW[0], generator(0, "mask", 0)
    chosen = mask(view.mask, MaskContext(image_BCHW=image_BCHW, patch_size=8, generator=chance))
    assert not chosen.valid_BK.all()
    with torch.no_grad():
        text_BL = torch.zeros(8, 1, dtype=torch.int64)
        found_VBD, _, kept = run.learner._encode(batch, (view,), None, text_BL, 0.0, generator(0, "mask", 0))
        for row in range(8):
            real = Selection(chosen.keep_BK[row : row + 1, chosen.valid_BK[row]])
            alone_BD = tower.proj(encode_masked(tower, tower.embed(image_BCHW[row : row + 1]), real))
            torch.testing.assert_close(found_VBD[0, row : row + 1], alone_BD, atol=1e-5, rtol=1e-4)
    assert float(kept) == pytest.approx(float(chosen.valid_BK.sum(1).double().mean()) / 16)


def test_the_kept_share_is_logged(pairs, tmp_path):
    found = train_step(open_run(eclip(pairs, tmp_path / "eclip")), 0)
    assert 0.2 < found["kept"] < 11 / 16
    assert train_step(open_run(eclip(pairs, tmp_path / "flip", recipe="flip50")), 0)["kept"] == 0.5
    assert train_step(open_run(eclip(pairs, tmp_path / "clip", recipe="clip")), 0)["kept"] == 1.0


def test_any_recipe_may_count_each_picture_apart(pairs, tmp_path):
    run = open_run(eclip(pairs, tmp_path, recipe="pgs-0.5", masker="pgs-pixels", least=0.3))
    spec = run.config.row.views[0].mask
    assert (spec.masker, spec.least, spec.mean_keep) == ("pgs-pixels", 0.3, None)
    assert spec.keep == pytest.approx(0.7) and spec.threshold == -run.config.threshold
    shares = [train_step(run, step)["kept"] for step in range(3)]
    assert all(0.3 < share < 0.7 for share in shares) and len(set(shares)) > 1
    # the recipe's own masker is no other masker
    assert eclip(pairs, tmp_path, masker="cluster").row == eclip(pairs, tmp_path).row


@pytest.mark.parametrize(
    ("changes", "word"),
    [(dict(recipe="clip", least=0.3), "masks nothing"), (dict(recipe="flip50", least=0.6), "must lie in"),
     (dict(recipe="pgs-0.5", least=0.3), "pgs-pixels"), (dict(recipe="att2x50", least=0.3), "do not change"),
     (dict(recipe="flip50_fold", least=0.3), "no fold"), (dict(recipe="eclip", threshold=3.0), "is a cosine"),
     (dict(recipe="flip50", threshold=0.1), "leave it out"), (dict(recipe="att2x50", masker="pgs"), "blocks of them")],
)  # fmt: skip
def test_counts_that_cannot_be_are_refused(pairs, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        check(eclip(pairs, tmp_path, **changes))
