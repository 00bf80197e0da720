"""Pictures with captions from every source: classes, your own folder, mixtures, shards; and views of them."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain_pairs import tiny, write_pairs

from patchrank.data import Dataset, Item
from patchrank.errors import UserError
from patchrank.pretrain.batches import Batches
from patchrank.pretrain.colour import COLOURS, NUM_DRAWS, Colour, change
from patchrank.pretrain.distributed import World
from patchrank.pretrain.draws import generator
from patchrank.pretrain.evaluate import check_pair, open_checks
from patchrank.pretrain.loop import open_run
from patchrank.pretrain.maskers import mask
from patchrank.pretrain.originals import Originals, crop
from patchrank.pretrain.pairs import TEMPLATES, UNSAID, load_pairs, mixture, with_captions
from patchrank.pretrain.pictures import Pictures
from patchrank.pretrain.rules import check
from patchrank.pretrain.shards import ShardStream, shard_paths


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def dataset(*items: Item, **changes) -> Dataset:
    return Dataset(**(dict(name="toy", split="train", images=list(items), read=lambda id: id.encode()) | changes))


def test_classes_become_captions_in_templates():
    toy = dataset(Item("a", 1), class_names=["cat", "dog"], templates=("a photo of a {}, a type of pet.",))
    captions = with_captions(toy).images[0].captions
    assert captions[0] == "a photo of a dog, a type of pet." and len(captions) == 1 + len(TEMPLATES)
    assert all("dog" in text for text in captions)


def test_blank_captions_fall_back_and_are_counted(caplog):
    with caplog.at_level(logging.WARNING):
        found = with_captions(dataset(Item("a", None, ("", "  ")), Item("b", None, (" a bird ", "")))).images
    assert [item.captions for item in found] == [(UNSAID,), ("a bird",)] and "1 pictures have blank" in caplog.text
    with pytest.raises(UserError, match="neither captions nor a class"):
        with_captions(dataset(Item("a")))


def test_mixture_reads_every_part_by_its_own_files():
    first = dataset(Item("x", None, ("one",)), read=lambda id: b"first " + id.encode())
    second = dataset(Item("x", 3, ("two",)), name="other", read=lambda id: b"second " + id.encode())
    mixed = mixture("toy+other", [first, second])
    assert [mixed.read(item.id) for item in mixed.images] == [b"first x", b"second x"]
    assert [item.captions for item in mixed.images] == [("one",), ("two",)] and not mixed.class_names
    with pytest.raises(UserError, match="twice"):
        mixture("toy+toy", [first, first])


def test_caption_folder_in_its_three_layouts(pairs, tmp_path):
    expected = {item.id: item.captions for item in load_pairs("captions", pairs).images}
    assert len(expected) == 32
    texts, table = shutil.copytree(pairs, tmp_path / "texts"), shutil.copytree(pairs, tmp_path / "table")
    (texts / "captions.json").unlink()
    for name, captions in expected.items():
        (texts / name).with_suffix(".txt").write_text("\n".join(captions))
    (table / "captions.json").rename(table / "old.json")
    rows = [f'{name},"{text}"' for name, captions in expected.items() for text in captions]
    (table / "captions.csv").write_text("filename,caption\n" + "\n".join(rows))
    for folder in (texts, table):
        assert {item.id: item.captions for item in load_pairs("captions", folder).images} == expected
        assert load_pairs("captions", folder).open("03.png").size == (40, 40)
    with pytest.raises(UserError, match=r"no picture with a caption in split 'val'.*captions\.csv"):
        load_pairs("captions", pairs, "val")
    with pytest.raises(UserError, match="does not exist"):
        load_pairs("captions", tmp_path / "nowhere")
    rows = json.loads((pairs / "captions.json").read_text())
    single = {name: row | {"captions": row["captions"][0]} for name, row in rows.items()}
    (table / "captions.json").write_text(json.dumps(single))
    assert {item.id: item.captions for item in load_pairs("captions", table).images} == expected, "a text is no list"
    (table / "captions.json").write_text(json.dumps({"03.png": {"split": "train", "captions": [1, 2]}}))
    with pytest.raises(UserError, match=r"\[1, 2\] must be a text or a list of texts"):
        load_pairs("captions", table)
    (table / "captions.json").unlink()
    (table / "captions.csv").write_bytes("filename,caption\n03.png,caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        load_pairs("captions", table)
    (table / "captions.csv").write_text("name,text\na,b")
    with pytest.raises(UserError, match="columns filename and caption"):
        load_pairs("captions", table)


def test_originals_are_opened_once_and_broken_ones_listed():
    opened = []

    def read(id: str):
        opened.append(id)
        if id == "torn":
            raise OSError("torn")
        return Image.new("RGB", (90, 60))

    originals = Originals(dataset(Item("good"), Item("torn"), read=read), most=20)
    pictures = [originals.get(number) for number in (0, 1, 0, 1)]
    assert opened == ["good", "torn"] and pictures[1] is None and "torn" in originals.broken[1]
    assert pictures[0].size == (30, 20)


def test_a_crop_is_the_box_resized_with_antialiasing():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)
    box = [7, 11, 40, 44]
    found = crop(smooth, box, 16)
    cut = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None, :, 7 : 7 + 40, 11 : 11 + 44].float()
    expected = F.interpolate(cut, (16, 16), mode="bilinear", antialias=True)
    # at its edge Pillow lets pixels beside the box join in
    assert (found.float() - expected[0])[:, 2:-2, 2:-2].abs().max() < 2


def test_views_boxes_and_the_teacher_s_picture(pairs, tmp_path):
    config = tiny(pairs, tmp_path, recipe="aclip_eff", batch_size=8, least_area=0.5)
    batches = Batches(config, load_pairs("captions", pairs), config.preprocess())
    batch = batches.at(0)
    assert batch.view_VBCHW.shape == (2, 8, 3, 32, 32) and batch.teacher_BCHW.shape == (8, 3, 16, 16)
    box_VB4, teacher_B4 = batch.box_VB4, batch.teacher_box_B4
    assert (box_VB4[..., :2] >= teacher_B4[:, :2]).all()
    assert (box_VB4[..., :2] + box_VB4[..., 2:] <= teacher_B4[:, :2] + teacher_B4[:, 2:]).all()
    assert (box_VB4[..., 2] * box_VB4[..., 3] >= 0.45 * 40 * 40).all()
    assert not torch.equal(batches.at(1).box_VB4, box_VB4)
    number = [item.id for item in batches.dataset.images].index(batch.ids[3])
    raw = crop(batches.originals.get(number), teacher_B4[3].tolist(), 16)
    torch.testing.assert_close(batch.teacher_BCHW[3], raw / 127.5 - 1, rtol=0, atol=1e-5)
    pooled = Batches(replace(config, workers=2), load_pairs("captions", pairs), config.preprocess()).at(0)
    assert torch.equal(pooled.view_VBCHW, batch.view_VBCHW)


def test_broken_pictures_leave_a_batch_or_are_stood_in_for(pairs, tmp_path):
    config = tiny(pairs, tmp_path, batch_size=8)
    source = load_pairs("captions", pairs)
    whole = Batches(config, source, config.preprocess()).at(0)
    read = source.read
    torn = replace(source, read=lambda id: b"no picture" if id == whole.ids[1] else read(id))
    alone = Batches(config, torn, config.preprocess())
    assert alone.at(0).ids == alone.at(0).ids == whole.ids[:1] + whole.ids[2:]
    assert list(alone.broken) == [whole.ids[1]] and alone.broken[whole.ids[1]]
    assert torch.equal(alone.at(0).view_VBCHW[0], whole.view_VBCHW[0][[0, 2, 3, 4, 5, 6, 7]])
    first, second = (Batches(config, torn, config.preprocess(), World(rank, 2)).at(0) for rank in (0, 1))
    assert first.num_pictures == second.num_pictures == 4 and whole.ids[1] not in first.ids
    with pytest.raises(UserError, match="every picture of a batch is broken"):
        Batches(config, replace(source, read=lambda _: b""), config.preprocess()).at(0)


def test_shards_feed_batches_and_bad_samples_are_skipped(pairs, tmp_path):
    library = pytest.importorskip("webdataset")
    with library.TarWriter(str(tmp_path / "000.tar")) as writer:
        for number, path in enumerate(sorted(pairs.glob("*.png"))[:12]):
            row = {"__key__": path.stem, "png": path.read_bytes() if number != 5 else b"torn"}
            words = {"json": json.dumps({"captions": [f"picture {number}", "a picture"]}).encode()}
            writer.write(row | (words if number != 7 else {}))
    assert shard_paths(tmp_path) == shard_paths(f"{tmp_path}/{{000..000}}.tar")
    config = tiny(pairs, tmp_path, data="shards", batch_size=12, recipe="att1x50")
    check(config)
    batches = Batches(config, ShardStream(shard_paths(tmp_path), 0, World()), config.preprocess())
    batch = batches.at(0)
    names = [path.stem for path in sorted(pairs.glob("*.png"))]
    assert set(batches.broken) == {names[5], names[7]} and "no caption" in batches.broken[names[7]]
    assert batch.num_pictures == 10 and batch.teacher_BCHW.shape[0] == 10
    assert {own[0] for own in batch.captions} == {f"picture {number}" for number in range(12)} - {
        "picture 5",
        "picture 7",
    }
    assert torch.equal(batches.at(0).view_VBCHW, batch.view_VBCHW)
    with pytest.raises(UserError, match="not found"):
        shard_paths(tmp_path / "{0..3}.tar")


@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_a_damaged_shard_is_told_once_and_the_others_go_on(tmp_path, caplog, pairs, damage):
    library = pytest.importorskip("webdataset")
    picture = next(pairs.glob("*.png")).read_bytes()
    for name in ("000", "001"):
        with library.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for number in range(6):
                writer.write({"__key__": f"{name} {number}", "png": picture, "txt": b"a picture"})
    path = tmp_path / "000.tar"
    path.write_bytes(path.read_bytes()[:2000] if damage == "cut" else b"junk" * 500)
    stream = ShardStream(shard_paths(tmp_path), 0, World(), buffer=1)
    with caplog.at_level(logging.WARNING):
        taken = stream.take(0, 20)
    assert len(taken) == 20 and None not in taken
    assert list(stream.broken) == [str(path)] and "ReadError" in stream.broken[str(path)]
    assert caplog.text.count("is damaged") == 1


def test_colours_stay_in_range_and_follow_their_draws():
    image_BCHW = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draw_BX = torch.rand(6, NUM_DRAWS, generator=torch.Generator().manual_seed(1))
    for colour in COLOURS.values():
        changed = change(image_BCHW, colour, draw_BX)
        assert changed.shape == image_BCHW.shape and changed.min() >= 0 and changed.max() <= 1
        torch.testing.assert_close(change(image_BCHW[2:4], colour, draw_BX[2:4]), changed[2:4])
    assert torch.equal(change(image_BCHW, None, draw_BX), image_BCHW)
    still = Colour(jitter_chance=0.0, gray_chance=0.0)
    assert torch.equal(change(image_BCHW, still, draw_BX), image_BCHW)
    gray = change(image_BCHW, replace(still, gray_chance=1.0), draw_BX)
    assert (gray[:, 0] - gray[:, 2]).abs().max() < 1e-6 and gray.std() > 0.05
    assert torch.equal(change(image_BCHW, replace(still, flip_chance=1.0), draw_BX), image_BCHW.flip(-1))
    halfway = draw_BX.index_fill(1, torch.arange(4), 0.5)
    torch.testing.assert_close(change(image_BCHW, Colour(jitter_chance=1.0, gray_chance=0.0), halfway), image_BCHW)
    blurred = change(image_BCHW, replace(still, blur_chance=1.0, blur=(40.0, 40.0)), draw_BX)
    assert blurred.std() < image_BCHW.std() / 1.5 and abs(blurred.mean() - image_BCHW.mean()) < 0.05


def test_checks_leave_out_what_lacks_the_split(pairs, caplog):
    with caplog.at_level(logging.WARNING):
        config = tiny(pairs, pairs)
        found = open_checks(config, "val", config.preprocess())
    assert found == [] and "no check on captions" in caplog.text
    assert len(open_checks(config, "train", config.preprocess())) == 1


@pytest.mark.parametrize("data", ["captions", "shards", "flickr8k"])
def test_checks_on_other_sets_look_where_the_catalog_does(pairs, monkeypatch, data):
    asked = []
    monkeypatch.setattr("patchrank.pretrain.evaluate.load_part", lambda *given: asked.append(given) or dataset())
    config = tiny(pairs, pairs, data=data, eval_data="captions+food101")
    open_checks(config, "val", config.preprocess())
    assert asked == [("captions", pairs, "val"), ("food101", pairs if data == "flickr8k" else None, "val")]


def test_a_check_without_a_readable_picture_has_no_metrics(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path))
    broken = dataset(Item("a", None, ("a bird",)), read=lambda id: b"no picture")
    assert check_pair(run.pair, [Pictures(broken, run.preprocess)], run.preprocess, 4) == {}
    classes = dataset(Item("a", 0), class_names=["bird"], read=lambda id: b"no picture")
    assert check_pair(run.pair, [Pictures(classes, run.preprocess)], run.preprocess, 4) == {}


def test_study_data_are_three_data_sets(assets):
    mixed = load_pairs("flickr8k+caltech101+food101")
    sizes = SimpleNamespace(flickr8k=6000, caltech101=4128, food101=10100)
    for name, num in vars(sizes).items():
        assert sum(item.id.startswith(f"{name}:") for item in mixed.images) == num
    assert mixed.open(mixed.images[-1].id).mode == "RGB" and all(item.captions for item in mixed.images)


def test_views_are_cut_at_their_boxes_and_masked_there(pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(COLOURS, "aclip", None)
    run = open_run(tiny(pairs, tmp_path, recipe="att2x50", batch_size=8, least_area=0.5))
    batch, given = run.batches.at(0), []
    place = {item.id: number for number, item in enumerate(run.batches.dataset.images)}
    for view in range(2):
        for row, id in enumerate(batch.ids):
            cut = crop(run.batches.originals.get(place[id]), batch.box_VB4[view, row].tolist(), 32)
            torch.testing.assert_close(batch.view_VBCHW[view, row], cut / 127.5 - 1, rtol=0, atol=1e-5)

    def spy(spec, context):
        given.append(context)
        return mask(spec, context)

    monkeypatch.setattr("patchrank.pretrain.learner.mask", spy)
    run.learner(batch, run.learner.recipe.views, 0.0, generator(0, "mask", 0))
    assert len(given) == 2 and not torch.equal(batch.box_VB4[0], batch.box_VB4[1])
    for view, context in enumerate(given):
        assert torch.equal(context.box_B4, batch.box_VB4[view])
        assert torch.equal(context.image_BCHW, batch.view_VBCHW[view])
        assert torch.equal(context.teacher.box_B4, batch.teacher_box_B4)
