"""A locked tower: features kept, halves of the classes, pieces of words, and a checkpoint without its weights."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from conftest import make_tower
from PIL import Image
from pretrain_pairs import tiny, write_pairs
from safetensors.torch import load_file
from tiny_clip import HALF, save_tiny_clip

from export.serve_text import tokenizer_of
from export.text_graph import text_graph, tokenizer_note, tokens_of
from patchrank.checkpoints.saved import save_clip
from patchrank.data import Dataset, Item, load_dataset
from patchrank.errors import UserError
from patchrank.loading import load_clip, reference_to
from patchrank.preprocess import Preprocess
from patchrank.pretrain import __main__ as command
from patchrank.pretrain.feature_cache import SHARD, FeatureCache
from patchrank.pretrain.learner import by_length, drop_tokens
from patchrank.pretrain.loop import open_run, save, train_step
from patchrank.pretrain.pairs import load_pairs, mixture, parts_of, without_names
from patchrank.pretrain.rules import check
from patchrank.text import END, PAD, START, VOCABULARY, TextConfig, TextTower, tokenize
from patchrank.word_pieces import MAX_MERGES, word_pieces

NAMES = ("ant", "bee", "cat", "dog", "eel")
PREPROCESS = Preprocess(image_size=(32, 32), resize=32, mean=HALF, std=HALF)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two pictures of each class in each split."""
    folder = tmp_path_factory.mktemp("classes")
    for split in ("train", "val", "test"):
        for number, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for place in range(2):
                colour = (50 * number, 100 * place, 60)
                Image.new("RGB", (40, 40), colour).save(folder / split / name / f"{place}.png")
    return folder


def toy(num: int, name: str = "toy", **changes) -> Dataset:
    """Plain pictures of different greys."""
    images = [Item(f"{number:04d}", None, (f"grey {number}",)) for number in range(num)]
    values = dict(name=name, split="train", images=images, read=lambda id: Image.new("L", (8, 8), int(id) % 256))
    return Dataset(**(values | changes))


def test_halves_hold_every_class_once_under_its_name(classes):
    whole = load_dataset("folder", classes, "train")
    halves = {half: load_dataset(f"folder/{half}", classes, "train") for half in ("even", "odd")}
    assert halves["even"].class_names == ["ant", "cat", "eel"] and halves["odd"].class_names == ["bee", "dog"]
    assert halves["even"].name == "folder/even" and "even" in halves["even"].split_source
    named = lambda one: {(item.id, one.class_names[item.label]) for item in one.images}  # noqa: E731
    assert named(halves["even"]) | named(halves["odd"]) == named(whole) and len(named(whole)) == 10
    assert not named(halves["even"]) & named(halves["odd"])
    with pytest.raises(UserError, match=r"folder/some.*choose folder/even or folder/odd"):
        load_dataset("folder/some", classes, "train")


def test_half_of_a_set_without_classes_is_refused(tmp_path):
    write_pairs(tmp_path / "pairs" / "train")
    with pytest.raises(UserError, match="no classes to halve"):
        load_dataset("folder/odd", tmp_path / "pairs" / "train", "test")


def test_captions_of_a_mixture_never_name_a_class_of_the_other_half(classes, caplog):
    part = load_dataset("folder/even", classes, "train")
    other = replace(part, name="other", class_names=["Bees", "cow", "DOG"])
    with caplog.at_level(logging.WARNING):
        kept = without_names(other, ["bee", "dog"])
    assert {item.label for item in kept.images} == {1} and "Bees, DOG left out" in caplog.text
    assert without_names(part, ["bee", "dog"]) is part
    spoken = {text for item in load_pairs("folder/even", classes).images for text in item.captions}
    assert any("cat" in text for text in spoken) and not any("dog" in text or "bee" in text for text in spoken)


def test_features_are_computed_once_and_shared_by_mixtures(tmp_path):
    tower = make_tower()
    cache = FeatureCache(tmp_path, tower, "hash", PREPROCESS)
    first, second = toy(SHARD + 3), toy(5, "other")
    broken = replace(second, read=lambda id: b"no picture" if id == "0002" else second.read(id))
    feature_ND, other_ND = cache.features(first), cache.features(broken)
    assert feature_ND.shape == (SHARD + 3, tower.config.feature_dim) and len(list(tmp_path.iterdir())) == 3
    image_1CHW = PREPROCESS(first.open("0007"))[None]
    with torch.no_grad():
        torch.testing.assert_close(feature_ND[7], tower(image_1CHW)[0], rtol=0, atol=1e-5)
    assert other_ND.isnan().all(1).tolist() == [False, False, True, False, False]

    def unread(id: str):
        raise AssertionError("opened again")

    mixed = mixture("toy+other", [replace(first, read=unread), replace(broken, read=unread)])
    torch.testing.assert_close(cache.features(mixed), torch.cat([feature_ND, other_ND]), equal_nan=True)
    twice = mixture("2xtoy+other", [replace(first, read=unread), replace(broken, read=unread)], [2, 1])
    expected_ND = torch.cat([feature_ND, feature_ND, other_ND])
    torch.testing.assert_close(cache.features(twice), expected_ND, equal_nan=True)
    with pytest.raises(AssertionError, match="opened again"):
        FeatureCache(tmp_path, tower, "another tower", PREPROCESS).features(mixed)


def test_a_damaged_file_of_features_is_computed_again(tmp_path, caplog):
    cache = FeatureCache(tmp_path, make_tower(), "hash", PREPROCESS)
    feature_ND = cache.features(toy(4))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(cache.features(toy(4)), feature_ND)
    assert "damaged" in caplog.text and path.read_bytes() != bytes(data)


def text_tower(**changes) -> TextTower:
    config = dict(context=16, width=16, num_layers=1, num_heads=2, mlp_width=16, output_dim=24)
    return TextTower(TextConfig(**(config | changes)))


@pytest.fixture
def referring(tmp_path, monkeypatch):
    """A checkpoint that refers to a tower below the assets folder; (its folder, the tower's)."""
    assets = tmp_path / "assets"
    tower = save_tiny_clip(assets / "weights" / "tower")
    monkeypatch.setenv("PATCHRANK_ASSETS", str(assets))
    clip = load_clip(str(tower))
    reference = reference_to(str(tower), "", clip)
    save_clip(
        tmp_path / "lit", reference, text_tower(num_merges=300, pool="mean"), clip.preprocess, 20.0, name="lit-toy"
    )
    return tmp_path / "lit", tower


def test_checkpoint_holds_no_weight_of_the_image_tower_and_finds_it(referring, monkeypatch):
    folder, tower = referring
    assert all(name.startswith("text.") for name in load_file(folder / "clip.safetensors"))
    manifest = json.loads((folder / "clip.json").read_text())
    assert manifest["image_tower"]["file"] == "$PATCHRANK_ASSETS/weights/tower" and "tower" not in manifest
    loaded, own = load_clip(str(folder)), load_clip(str(tower))
    assert loaded.weights_hash == own.weights_hash and loaded.model_name == "lit-toy" and loaded.class_head is None
    assert loaded.pretrained.startswith("clip-") and loaded.text(["an ant", "a bee"]).shape == (2, 24)
    monkeypatch.delenv("PATCHRANK_ASSETS")
    with pytest.raises(UserError, match=r"text tower alone.*not there.*PATCHRANK_ASSETS.*--pretrained"):
        load_clip(str(folder))
    assert load_clip(str(folder), str(tower)).weights_hash == own.weights_hash
    (folder / "tower").symlink_to(tower)
    assert load_clip(str(folder / "clip.safetensors")).weights_hash == own.weights_hash


def test_another_image_tower_is_refused(referring, tmp_path):
    folder, _ = referring
    other = save_tiny_clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"belongs to an image tower with hash .*--pretrained"):
        load_clip(str(folder), str(other))


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("embedded", "", {"model": "embedded", "pretrained": "", "file": ""}),
        ("ViT-B-32", "openai", {"model": "ViT-B-32", "pretrained": "openai", "file": ""}),
        ("vit_a", "{}/w.pt", {"model": "vit_a", "pretrained": "", "file": "{}/w.pt"}),
        ("timm:vit_a@{}/w.pt", "", {"model": "timm:vit_a", "pretrained": "", "file": "{}/w.pt"}),
    ],
)
def test_references_say_what_was_given(tmp_path, model, pretrained, expected):
    (tmp_path / "w.pt").touch()
    clip = load_clip()
    found = reference_to(model.format(tmp_path), pretrained.format(tmp_path), clip)
    assert vars(found) == {name: text.format(tmp_path) for name, text in expected.items()} | {
        "weights_hash": clip.weights_hash
    }


def test_word_pieces_are_clip_s_with_all_merges_and_shorter_with_few():
    from open_clip.tokenizer import SimpleTokenizer

    text = "A Dalmatian's <end_of_text> 12 caf\u00e9s"
    assert word_pieces("a dog, running", MAX_MERGES) == SimpleTokenizer().encode("a dog, running")
    few, all_of_them = word_pieces(text, 300), word_pieces(text, MAX_MERGES)
    assert len(few) > len(all_of_them) and max(few) < 512 + 300 and max(all_of_them) < 512 + MAX_MERGES
    token_BL = tokenize(["a dog", "a"], 8, 300)
    own = [VOCABULARY + piece for piece in word_pieces("a dog", 300)]
    assert token_BL[0].tolist() == [START, *own, END] + [PAD] * (6 - len(own))
    assert TextConfig(num_merges=300).vocabulary == VOCABULARY + 812
    with pytest.raises(UserError, match="num_merges=50000"):
        TextTower(TextConfig(num_merges=50_000))


def test_dropped_tokens_are_padding_and_never_start_or_end():
    token_BL = tokenize(["abcdefgh" * 20] * 50, 64)
    dropped_BL = drop_tokens(token_BL, 0.25, torch.Generator().manual_seed(0))
    changed_BL = dropped_BL != token_BL
    assert (dropped_BL[changed_BL] == PAD).all() and 0.2 < changed_BL.float().mean() < 0.3
    assert (dropped_BL[:, 0] == START).all() and ((dropped_BL == END).sum(1) == 1).all()


def test_a_text_tower_of_word_pieces_exports_and_serves(referring):
    folder, _ = referring
    clip, texts = load_clip(str(folder)), ["an ant", "two bees and a cat"]
    graph, note = text_graph(clip), tokenizer_note(clip)
    token_BL = torch.from_numpy(tokenizer_of(note)(texts))
    assert torch.equal(token_BL, tokens_of(clip, texts)) and note["kind"] == "word pieces"
    with torch.no_grad():
        torch.testing.assert_close(graph(token_BL), clip.text(texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["end", "mean"])
def test_texts_by_length_are_those_of_one_batch(pool):
    tower = text_tower(context=32, pool=pool).eval()
    token_BL = drop_tokens(tower.tokenize(["x" * (7 * n % 40) for n in range(20)]), 0.2, torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(by_length(tower, token_BL, 6), tower(token_BL), rtol=0, atol=1e-5)


def test_a_part_of_a_mixture_can_be_there_several_times(classes):
    images = load_pairs("3xfolder/even", classes).images
    assert len(images) == 18 and len({item.id for item in images}) == 6 and parts_of("2xflickr8k+coco")[0] == "flickr8k"
    with pytest.raises(UserError, match="0xflickr8k: unknown"):
        parts_of("0xflickr8k")


def lit(folder, out, **changes):
    values = dict(data="folder/even", recipe="lit", num_steps=6, num_warmup=1, batch_size=6, num_merges=300,
                  text_pool="mean", word_drop=0.2, eval_every=3, log_every=3, name="lit-toy")  # fmt: skip
    return tiny(folder, out, **(values | changes))


def test_a_locked_run_resumes_and_its_checkpoint_answers(classes, tmp_path, capsys):
    whole, halved = (open_run(lit(classes, tmp_path / name, cache=tmp_path / "cache")) for name in ("whole", "halved"))
    losses = [train_step(whole, step)["loss"] for step in range(6)]
    assert losses[:3] == [train_step(halved, step)["loss"] for step in range(3)]
    save(halved)
    command.main(halved.config)
    loaded = load_clip(str(tmp_path / "halved"))
    assert loaded.model_name == "lit-toy" and loaded.weights_hash == load_clip().weights_hash
    trained = whole.pair.text.state_dict()["proj.weight"].half().float()
    assert torch.equal(loaded.text.tower.state_dict()["proj.weight"], trained)
    manifest = json.loads((tmp_path / "halved/clip.json").read_text())
    assert set(manifest["recipe"]["metrics"]["test"]) == {"folder/even accuracy"}
    assert "locked" in manifest["recipe"]["card"] and "model in" in capsys.readouterr().out
    assert not (tmp_path / "halved/features").exists() and len(list((tmp_path / "cache").iterdir())) == 3


def test_rules_of_a_locked_run(classes, tmp_path):
    check(lit(classes, tmp_path))
    for changes, rule in ((dict(recipe="clip"), "for --recipe lit"), (dict(num_merges=50_000), "at most 48894"),
                          (dict(text_pool="max"), "end or mean"), (dict(word_drop=1.0), "in \\[0, 1\\)")):  # fmt: skip
        with pytest.raises(UserError, match=rule):
            check(lit(classes, tmp_path, **changes))
