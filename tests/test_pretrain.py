"""The pretraining command on digits: what it writes, what it refuses, and that a finished run stays as it is."""

import json

import pytest
import torch
from PIL import Image

from patchrank import cli
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.pretrain.__main__ import main
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import cost_table
from patchrank.pretrain.loop import open_run, state_path, train, train_step
from patchrank.pretrain.maskers import MASKERS
from patchrank.pretrain.model import build_pair
from patchrank.pretrain.rules import check, notes
from patchrank.pretrain.state import save_state

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(
    image_size=32,
    patch_size=8,
    width=32,
    num_layers=2,
    num_heads=2,
    feature_dim=16,
    text_width=32,
    text_layers=1,
    batch_size=8,
    num_steps=6,
    num_warmup=1,
    save_every=2,
    eval_every=100,
    threads=1,
)


@pytest.fixture
def config(tmp_path):
    return lambda **changes: PretrainConfig(**(TINY | {"out": tmp_path / "run"} | changes))


@pytest.fixture
def few_val(monkeypatch):
    """Checks on 20 pictures instead of thousands."""
    import patchrank.pretrain.evaluate as evaluate

    load = evaluate.load_part

    def short(name, root, split):
        dataset = load(name, root, split)
        del dataset.images[20:]
        return dataset

    monkeypatch.setattr(evaluate, "load_part", short)


def test_scale_stays_at_most_100(config):
    run = open_run(config())
    with torch.no_grad():
        run.pair.log_scale.fill_(10.0)
    run.pair.clamp_scale()
    assert run.pair.log_scale.exp().item() == pytest.approx(100.0)


def test_command_writes_a_model_that_load_clip_reads(config, few_val, capsys):
    chosen = config(num_steps=2)
    main(chosen)
    clip = load_clip(str(chosen.out))
    state = open_run(chosen).pair.state_dict()
    for name, tensor in clip.tower.state_dict().items():
        assert torch.equal(tensor, state[f"tower.{name}"].half().float())
    manifest = json.loads((chosen.out / "clip.json").read_text())
    assert clip.model_name == "clip-digits"
    assert manifest["recipe"]["settings"] == chosen.settings()
    assert manifest["recipe"]["metrics"].keys() == {"val", "test"}
    assert manifest["recipe"]["metrics"]["test"].keys() == {"digits accuracy"}
    assert manifest["recipe"]["num_test"] == {"digits": 20}
    assert "Zero-shot accuracy" in manifest["recipe"]["card"] and "Limits" in manifest["recipe"]["card"]
    assert "2 of 2 steps of 8 to go" in capsys.readouterr().out


def test_finished_run_computes_nothing_more(config, few_val):
    chosen = config(num_steps=2)
    main(chosen)
    weights_before = (chosen.out / "clip.safetensors").read_bytes()
    run = open_run(chosen)
    train(run)
    assert run.progress.step == 2
    main(chosen)
    assert (chosen.out / "clip.safetensors").read_bytes() == weights_before


def test_dry_run_prints_the_table_and_draws_the_masks(config, capsys):
    chosen = config(dry_run=True, recipe="aclip", least_area=0.5)
    main(chosen)
    said = capsys.readouterr().out
    assert "> aclip " in said and "x CLIP" in said and "see only 8 pictures at a time" in said
    assert "holds all views of 8 of 8 pictures" in said
    assert [path.name for path in chosen.out.iterdir()] == ["masks.png"]
    with Image.open(chosen.out / "masks.png") as picture:
        assert picture.height > 16 * 32 and picture.width > len(MASKERS) * 32


def test_state_of_other_settings_is_refused(config):
    run = open_run(config())
    train_step(run, 0)
    save_state(state_path(run.config.out), run.learner, run.optimiser, run.progress, run.config.settings())
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.001"):
        open_run(config(lr=0.5))
    state_path(run.config.out).write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be read"):
        open_run(config())


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(recipe="glip"), "clip, flip50"),
        (dict(data="digit"), "digits"),
        (dict(image_size=30), "multiple of --patch-size 8"),
        (dict(width=30), "multiple of 4 x --num-heads"),
        (dict(num_steps=0), "1 or more"),
        (dict(lr=float("inf")), "positive and finite"),
        (dict(epsilon=float("inf")), "positive and finite"),
        (dict(weight_decay=float("inf")), "finite"),
        (dict(text_width=0), "1 or more"),
        (dict(context=2), "3 or more"),
        (dict(context=10**8), "at most 4096"),
        (dict(threads=10**5), "at most 1024"),
        (dict(seed=2**63), "below"),
        (dict(recipe="aclip", batch_size=1), "two pictures in each of 1 parts"),
        (dict(recipe="slip", batch_size=8, accumulate=8), "must be 16 or more"),
        (dict(eval_data="glyphs"), "--eval-data glyphs: unknown"),
        (dict(data=""), "--data '': unknown"),
        (dict(num_warmup=6), "less than --num-steps"),
        (dict(cheap_keep=0.0), r"\(0, 1\]"),
        (dict(data="digits+glyphs"), "glyphs: unknown"),
        (dict(masker="txt", recipe="flip50"), "txt: unknown"),
        (dict(masker="pgs"), "clip masks nothing"),
        (dict(masker="text", recipe="flip50"), "has one, such as att1x50"),
        (dict(contrast="triplet"), "clip or siglip"),
        (dict(recipe="aclip", image_size=40), "blocks of 2 x 2"),
        (dict(data="digits+shards"), "do not mix"),
        (dict(accumulate=3), "multiple of 3"),
        (dict(precision="float16"), "float32 or bfloat16"),
        (dict(lr_end=1.0), "between 0 and --lr"),
        (dict(tuning=2.0), r"\[0, 1\]"),
        (dict(curriculum=1.0), r"\[0, 1\)"),
        (dict(device="tpu"), "cpu or cuda"),
        (dict(pretrained="tower.safetensors"), "locked tower of --recipe lit; clip starts from nothing"),
    ],
)
def test_bad_values_name_the_rule(config, changes, word):
    with pytest.raises(UserError, match=word):
        check(config(**changes))


def test_flags_that_change_nothing_are_told_but_allowed(config):
    assert notes(config(recipe="aclip", head_width=64, tuning=0.1)) == []
    told = "\n".join(notes(config(recipe="flip50", data="food101", head_out=16, head_width=64, curriculum=0.5)))
    assert told.count("changes nothing") == 3 and "--head-width 64" in told and "only digits can" in told
    without = config(recipe="aclip", weights=("simclr=0", "byol=0"), head_out=16)
    assert notes(without) == ["note: --head-out 16 changes nothing: aclip has no heads of SimCLR or BYOL"]
    lit = PretrainConfig(recipe="lit", image_size=96, lr=0.1)
    assert [line.split()[1] for line in notes(lit)] == ["--image-size"]


def test_help_tells_the_values_that_the_setting_gives(capsys):
    with pytest.raises(SystemExit):
        cli.run(main, PretrainConfig, prog="pretrain", args=["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default of clip: 5000 on digits, 10000 on other data, 89650 with --setting paper)" in said
    assert "(default of clip: 0.98)" in said and "(default: the recipe's)" in said


def test_the_cost_table_counts_the_masks_and_losses_that_flags_ask_for(config):
    def macs(recipe="aclip", **changes):
        rows = cost_table(config(recipe=recipe, **changes))
        return {row.recipe: row.macs for row in rows}

    usual, bare = macs(), macs(weights=("simclr=0", "byol=0"))
    assert bare.pop("aclip") == usual["att2x50"] and usual.pop("aclip") > usual["att2x50"] and bare == usual


def test_a_killed_save_leaves_nothing_behind(config, few_val):
    chosen = config()
    chosen.out.mkdir()
    (chosen.out / ".state.safetensors.x1y2.tmp").write_bytes(b"half a file")
    main(chosen)
    assert not list(chosen.out.glob(".*.tmp")) and state_path(chosen.out).exists()


def test_batch_larger_than_the_data_is_refused(config):
    with pytest.raises(UserError, match="20000 train pictures"):
        open_run(config(batch_size=20_001))


def test_same_seed_same_towers_and_global_chance_untouched(config):
    chosen = config()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (build_pair(chosen.tower_config(), chosen.text_config(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first.tower.patch.weight, third.tower.patch.weight)
