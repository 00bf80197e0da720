"""Every row of the catalog against a miniature of its official layout; a row without a miniature fails."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from patchrank.data import CATALOG, load_dataset
from patchrank.errors import UserError


@dataclass
class Mini:
    """Files of a miniature, and what must come out: ids, labels (or captions) of each split."""

    files: dict[str, object]
    items: dict[str, list[tuple[str, object]]]
    class_names: list[str]
    source: str
    folder: str = "data"


def picture(seed: int = 0, mode: str = "RGB", suffix: str = ".jpg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG" if suffix == ".png" else "JPEG")
    return file.getvalue()


def pictures(*names: str) -> dict[str, object]:
    return {name: picture(seed) for seed, name in enumerate(names)}


def mat(**values) -> bytes:
    file = io.BytesIO()
    savemat(file, values)
    return file.getvalue()


def coop_mini(folder: str, split_file: str, below: str) -> Mini:
    rows = {
        "train": [["b/2.jpg", 1, "big_cat"], ["a/1.jpg", 0, "ant"]],
        "val": [["a/3.jpg", 0, "ant"]],
        "test": [["b/4.jpg", 1, "big_cat"]],
    }
    files = pictures(*[f"{below}/{row[0]}" for part in rows.values() for row in part]) | {split_file: rows}
    items = {split: [(f"{below}/{path}", label) for path, label, _ in part] for split, part in rows.items()}
    return Mini(files, items, ["ant", "big cat"], split_file, folder)


def karpathy_mini(folder: str, split_file: str, below: str, filepath: str = "") -> Mini:
    names = {"train": "1.jpg", "restval": "2.jpg", "val": "3.jpg", "test": "4.jpg"}
    rows = [
        {"filename": name, "split": part, "sentences": [{"raw": f"one {part} "}, {"raw": f"two {part}"}]}
        | ({"filepath": filepath} if filepath else {})
        for part, name in names.items()
    ]
    full = {part: "/".join(filter(None, (below, filepath, name))) for part, name in names.items()}
    texts = {part: (f"one {part}", f"two {part}") for part in names}
    items = {part: [(full[part], texts[part])] for part in ("train", "val", "test")}
    items["train"].append((full["restval"], texts["restval"]))
    return Mini(pictures(*full.values()) | {split_file: {"images": rows}}, items, [], split_file, folder)


FLICKR8K_TOKENS = "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\nc.jpg#0\tfour\n"
AIRCRAFT = {
    "images/1.jpg": picture(1),
    "images/2.jpg": picture(2),
    "variants.txt": "707-320\nF-16A/B\n",
    "images_variant_train.txt": "1 F-16A/B\n",
    "images_variant_val.txt": "2 707-320\n",
    "images_variant_test.txt": "2 707-320\n",
}
AIRCRAFT_ITEMS = {"train": [("images/1.jpg", 1)], "val": [("images/2.jpg", 0)], "test": [("images/2.jpg", 0)]}
TINY_CLASSES = [{"wnid": "n2", "name": "zebra, horse"}, {"wnid": "n1", "name": "ant"}]
IMAGENET = ["n01440764", "n01443537"]
IMAGENET_FILES = [f"{split}/{wnid}/x.JPEG" for split in ("train", "val") for wnid in reversed(IMAGENET)]
IMAGENET_ITEMS = {
    split: [(f"{part}/{wnid}/x.JPEG", label) for label, wnid in enumerate(IMAGENET)]
    for split, part in {"train": "train", "val": "val", "test": "val"}.items()
}

DRAWN = [name for name, row in CATALOG.items() if row.draw]
CREPE = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


def wnid_mini(folder: str, names: dict[str, str], inside: str = "") -> Mini:
    """A variant of ImageNet with one picture of each of its first classes."""
    files = [f"{inside}{wnid}/x.jpg" for wnid in names]
    items = {"test": [(file, label) for label, file in enumerate(files)]}
    return Mini(pictures(*reversed(files)), items, list(names.values()), inside or "./", folder)


SKETCH = {"n01440764": "tench", "n01443537": "goldfish"}


def crepe_mini(below: str, files: str) -> Mini:
    rows = {
        category: {
            "0": {"filename": "2.jpg", "caption": f"a {category}", "negative_caption": "no"},
            "7": {"filename": "1.jpg", "caption": "b", "negative_caption": "not b"},
        }
        for category in CREPE
    }
    items = {
        category: [(f"{below}2.jpg", (f"a {category}", "no")), (f"{below}1.jpg", ("b", "not b"))] for category in CREPE
    }
    content = {f"{files}{category}.json": row for category, row in rows.items()}
    return Mini(pictures(f"{below}1.jpg", f"{below}2.jpg") | content, items, [], files, "sugar-crepe")


# One entry per catalog row (its CoOp or main layout) ...
MINIATURES: dict[str, Callable[[], Mini]] = {
    **{name: lambda: Mini({"unused.txt": ""}, {}, [], "drawn from scikit-learn's load_digits") for name in DRAWN},
    "imagenet-v2": lambda: Mini(
        pictures("10/a.jpeg", "2/b.jpeg", "0/c.jpeg"),
        {"test": [("0/c.jpeg", 0), ("2/b.jpeg", 2), ("10/a.jpeg", 10)]},
        ["tench", "goldfish"],
        "0/ .. 999/",
        "imagenetv2-matched-frequency-format-val",
    ),
    "imagenet-a": lambda: wnid_mini("imagenet-a", {"n01498041": "stingray", "n01531178": "goldfinch"}),
    "imagenet-o": lambda: wnid_mini("imagenet-o", {"n01443537": "goldfish", "n01704323": "triceratops"}),
    "imagenet-r": lambda: wnid_mini("imagenet-r", {"n01443537": "goldfish", "n01484850": "great white shark"}),
    "imagenet-sketch": lambda: wnid_mini("imagenet-sketch", SKETCH),
    "sugarcrepe": lambda: crepe_mini("val2017/", "data/"),
    "folder": lambda: Mini(
        pictures("b_c/1.jpg", "a/x/2.png", "a/1.JPG") | {"a/notes.txt": "", ".hidden/3.jpg": picture()},
        {split: [("a/1.JPG", 0), ("a/x/2.png", 0), ("b_c/1.jpg", 1)] for split in ("all", "test")},
        ["a", "b c"],
        "all",
    ),
    "caltech101": lambda: coop_mini("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
    "pets": lambda: coop_mini("oxford_pets", "split_zhou_OxfordPets.json", "images"),
    "flowers102": lambda: coop_mini("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
    "food101": lambda: coop_mini("food-101", "split_zhou_Food101.json", "images"),
    "aircraft": lambda: Mini(AIRCRAFT, AIRCRAFT_ITEMS, ["707-320", "F-16A/B"], "images_variant_", "fgvc_aircraft"),
    "dtd": lambda: coop_mini("dtd", "split_zhou_DescribableTextures.json", "images"),
    "ucf101": lambda: coop_mini("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes"),
    "imagenet": lambda: Mini(pictures(*IMAGENET_FILES), IMAGENET_ITEMS, ["tench", "goldfish"], "", "imagenet"),
    "tiny-imagenet": lambda: Mini(
        pictures("train/n1/images/n1_0.JPEG", "train/n2/images/n2_0.JPEG", "val/images/v0.JPEG", "val/images/v1.JPEG")
        | {"wnids.txt": "n2\nn1\n", "words.txt": "n1\tant\nn2\tzebra, horse\nn3\tcow\n"}
        | {"val/val_annotations.txt": "v1.JPEG\tn1\t0\t0\t1\t1\nv0.JPEG\tn2\t0\t0\t1\t1\n"},
        {
            "train": [("train/n1/images/n1_0.JPEG", 0), ("train/n2/images/n2_0.JPEG", 1)],
            "val": [("val/images/v1.JPEG", 0), ("val/images/v0.JPEG", 1)],
            "test": [("val/images/v1.JPEG", 0), ("val/images/v0.JPEG", 1)],
        },
        ["ant", "zebra"],
        "",
        "tiny-imagenet-200",
    ),
    "flickr8k": lambda: Mini(
        pictures(*[f"Flicker8k_Dataset/{name}.jpg" for name in "abc"])
        | {"Flickr8k_text/Flickr8k.token.txt": FLICKR8K_TOKENS}
        | {
            f"Flickr8k_text/Flickr_8k.{part}Images.txt": f"{name}.jpg\n"
            for part, name in (("train", "a"), ("dev", "b"), ("test", "c"))
        },
        {
            "train": [("Flicker8k_Dataset/a.jpg", ("one", "two"))],
            "val": [("Flicker8k_Dataset/b.jpg", ("three",))],
            "test": [("Flicker8k_Dataset/c.jpg", ("four",))],
        },
        [],
        "Flickr8k_text/Flickr_8k.",
        "flickr8k",
    ),
    "flickr30k": lambda: karpathy_mini("flickr30k", "dataset_flickr30k.json", "flickr30k-images"),
    "coco": lambda: karpathy_mini("coco", "dataset_coco.json", "", "val2014"),
}

# ... and the other official layouts that rows accept.
OTHER_LAYOUTS: dict[str, tuple[str, Callable[[], Mini]]] = {
    "pets, official": (
        "pets",
        lambda: Mini(
            pictures("images/Great_Dane_1.jpg", "images/Bengal_7.jpg")
            | {"annotations/trainval.txt": "#comment\nGreat_Dane_1 2 2 1\nBengal_7 1 1 1\n"}
            | {"annotations/test.txt": "Bengal_7 1 1 1\nGreat_Dane_1 2 2 1\n"},
            {"train": [("images/Great_Dane_1.jpg", 1), ("images/Bengal_7.jpg", 0)]},
            ["bengal", "great dane"],
            "annotations/trainval.txt",
            "oxford-iiit-pet",
        ),
    ),
    "flowers102, official": (
        "flowers102",
        lambda: Mini(
            pictures("jpg/image_00001.jpg", "jpg/image_00002.jpg", "jpg/image_00003.jpg")
            | {"cat_to_name.json": {"2": "rose", "1": "fire lily"}, "imagelabels.mat": mat(labels=[[2, 1, 2]])}
            | {"setid.mat": mat(trnid=[[3, 2]], valid=[[1]], tstid=[[1, 3]])},
            {
                "train": [("jpg/image_00003.jpg", 1), ("jpg/image_00002.jpg", 0)],
                "val": [("jpg/image_00001.jpg", 1)],
                "test": [("jpg/image_00001.jpg", 1), ("jpg/image_00003.jpg", 1)],
            },
            ["fire lily", "rose"],
            "setid.mat",
            "oxford_flowers",
        ),
    ),
    "food101, official": (
        "food101",
        lambda: Mini(
            pictures("images/apple_pie/1.jpg", "images/waffles/2.jpg", "images/waffles/3.jpg")
            | {"meta/train.json": {"waffles": ["waffles/2"], "apple_pie": ["apple_pie/1"]}}
            | {"meta/test.json": {"apple_pie": [], "waffles": ["waffles/3"]}},
            {
                "train": [("images/apple_pie/1.jpg", 0), ("images/waffles/2.jpg", 1)],
                "test": [("images/waffles/3.jpg", 1)],
            },
            ["apple pie", "waffles"],
            "meta/",
            "food-101",
        ),
    ),
    "dtd, official": (
        "dtd",
        lambda: Mini(
            pictures("images/banded/1.jpg", "images/polka-dotted/2.jpg")
            | {"labels/train1.txt": "polka-dotted/2.jpg\n", "labels/val1.txt": "banded/1.jpg\n"}
            | {"labels/test1.txt": "banded/1.jpg\n"},
            {"train": [("images/polka-dotted/2.jpg", 1)], "val": [("images/banded/1.jpg", 0)]},
            ["banded", "polka-dotted"],
            "labels/",
            "dtd",
        ),
    ),
    "ucf101, official": (
        "ucf101",
        lambda: Mini(
            pictures("UCF-101-midframes/Yo_Yo/v_YoYo_g01.jpg", "UCF-101-midframes/Handstand_Pushups/v_Hand_g01.jpg")
            | {"ucfTrainTestlist/classInd.txt": "1 HandStandPushups\n2 YoYo\n"}
            | {"ucfTrainTestlist/trainlist01.txt": "YoYo/v_YoYo_g01.avi 2\nHandstandPushups/v_Hand_g01.avi 1\n"}
            | {"ucfTrainTestlist/testlist01.txt": "YoYo/v_YoYo_g01.avi\n"},
            {
                "train": [
                    ("UCF-101-midframes/Yo_Yo/v_YoYo_g01.jpg", 1),
                    ("UCF-101-midframes/Handstand_Pushups/v_Hand_g01.jpg", 0),
                ],
                "test": [("UCF-101-midframes/Yo_Yo/v_YoYo_g01.jpg", 1)],
            },
            ["Hand Stand Pushups", "Yo Yo"],
            "ucfTrainTestlist/",
            "ucf101",
        ),
    ),
    "aircraft, as unpacked": (
        "aircraft",
        lambda: Mini(
            {f"data/{name}": content for name, content in AIRCRAFT.items()},
            {split: [(f"data/{name}", label) for name, label in rows] for split, rows in AIRCRAFT_ITEMS.items()},
            ["707-320", "F-16A/B"],
            "data/images_variant_",
            "fgvc-aircraft-2013b",
        ),
    ),
    "imagenet, CoOp": (
        "imagenet",
        lambda: Mini(
            pictures(*[f"images/{name}" for name in IMAGENET_FILES]),
            {split: [(f"images/{name}", label) for name, label in rows] for split, rows in IMAGENET_ITEMS.items()},
            ["tench", "goldfish"],
            "images/",
            "imagenet",
        ),
    ),
    "imagenet, Kaggle": (
        "imagenet",
        lambda: Mini(
            pictures("ILSVRC/Data/CLS-LOC/val/v1.JPEG", "ILSVRC/Data/CLS-LOC/val/v2.JPEG")
            | {"LOC_val_solution.csv": "ImageId,PredictionString\nv1,n01443537 1 2 3 4\nv2,n01440764 1 2 3 4 \n"},
            {"val": [("ILSVRC/Data/CLS-LOC/val/v1.JPEG", 1), ("ILSVRC/Data/CLS-LOC/val/v2.JPEG", 0)]},
            ["tench", "goldfish"],
            "LOC_val_solution.csv",
            "imagenet",
        ),
    ),
    "imagenet-sketch, as unpacked": ("imagenet-sketch", lambda: wnid_mini("ImageNet-Sketch", SKETCH, "sketch/")),
    "sugarcrepe, flat": ("sugarcrepe", lambda: crepe_mini("", "")),
    "tiny-imagenet, classes.json": (
        "tiny-imagenet",
        lambda: Mini(
            pictures("train/n1/a.JPEG", "train/n2/b.JPEG", "val/n1/c.JPEG") | {"classes.json": TINY_CLASSES},
            {"train": [("train/n1/a.JPEG", 1), ("train/n2/b.JPEG", 0)], "val": [("val/n1/c.JPEG", 1)]},
            ["zebra", "ant"],
            "",
            "tiny-imagenet",
        ),
    ),
    "flickr8k, captions.json": (
        "flickr8k",
        lambda: Mini(
            pictures("images/a.jpg", "images/b.jpg")
            | {"captions.json": {"b.jpg": {"split": "val", "captions": ["x", "y"]},
                                 "a.jpg": {"split": "test", "captions": ["z"]}}},
            {"val": [("images/b.jpg", ("x", "y"))], "test": [("images/a.jpg", ("z",))]},
            [],
            "captions.json",
            "flickr8k",
        ),
    ),
    "flickr8k, Karpathy": ("flickr8k", lambda: karpathy_mini("flickr8k", "dataset_flickr8k.json", "images")),
    "coco, 2017": (
        "coco",
        lambda: Mini(
            pictures("val2017/000000000001.jpg", "val2017/000000000002.jpg")
            | {"annotations/captions_val2017.json": {
                "images": [{"id": 2, "file_name": "000000000002.jpg"}, {"id": 1, "file_name": "000000000001.jpg"}],
                "annotations": [{"image_id": 1, "caption": "one\n"}, {"image_id": 2, "caption": "two"},
                                {"image_id": 1, "caption": "uno"}]}},
            {"val": [("val2017/000000000002.jpg", ("two",)), ("val2017/000000000001.jpg", ("one", "uno"))]},
            [],
            "annotations/captions_val2017.json",
            "coco",
        ),
    ),
    "folder with splits": (
        "folder",
        lambda: Mini(
            pictures("train/b/1.jpg", "train/a/2.jpg", "test/b/3.jpg"),
            {
                "train": [("train/a/2.jpg", 0), ("train/b/1.jpg", 1)],
                "test": [("test/b/3.jpg", 1)],
                "all": [("train/a/2.jpg", 0), ("train/b/1.jpg", 1), ("test/b/3.jpg", 1)],
            },
            ["a", "b"],
            "",
        ),
    ),
    "flat folder": (
        "folder",
        lambda: Mini(pictures("2.jpg", "10.jpg"), {"test": [("10.jpg", None), ("2.jpg", None)]}, [], "all"),
    ),
}  # fmt: skip

LAYOUTS = {name: (name, build) for name, build in MINIATURES.items()} | OTHER_LAYOUTS


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def build(layout: str, tmp_path: Path) -> tuple[str, Mini, Path]:
    """Row name, miniature, and the data root that holds it."""
    name, make = LAYOUTS[layout]
    mini = make()
    write(tmp_path / mini.folder, mini.files)
    return name, mini, tmp_path if CATALOG[name].folders else tmp_path / mini.folder


def judged_split(name: str) -> str:
    """The split to judge on: "test", or the first of a data set whose splits are something else."""
    return "test" if "test" in CATALOG[name].splits else next(iter(CATALOG[name].splits))


def test_every_row_has_a_miniature():
    assert set(MINIATURES) == set(CATALOG)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_its_items(layout, tmp_path):
    name, mini, root = build(layout, tmp_path)
    for split, expected in mini.items.items():
        dataset = load_dataset(name, root, split)
        values = [(item.id, item.captions or item.label) for item in dataset.images]
        assert values == expected
        assert dataset.class_names[: len(mini.class_names)] == mini.class_names
        assert dataset.split_source.startswith(mini.source)
        assert dataset.missing == []
        assert dataset.open(expected[0][0]).mode == "RGB"
        assert all("{}" in template for template in dataset.templates)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in DRAWN])
def test_tar_and_folder_give_the_same(layout, tmp_path):
    name, mini, root = build(layout, tmp_path)
    folder = tmp_path / mini.folder
    split = next(iter(mini.items))
    direct = load_dataset(name, root, split)
    direct_bytes = [direct.read(item.id) for item in direct.images]
    with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as tar:
        tar.add(folder, "inside")
    shutil.rmtree(folder)
    packed = load_dataset(name, tmp_path if CATALOG[name].folders else tmp_path / f"{folder.name}.tar", split)
    assert packed.images == direct.images
    assert [packed.read(item.id) for item in packed.images] == direct_bytes
    assert packed.root == tmp_path / f"{folder.name}.tar"


@pytest.mark.parametrize("name", [name for name, row in CATALOG.items() if row.folders])
def test_absent_data_says_where_and_what(name, tmp_path):
    row = CATALOG[name]
    with pytest.raises(UserError) as error:
        load_dataset(name, tmp_path, judged_split(name))
    for part in (str(tmp_path / row.folders[0]), row.layout, row.source):
        assert part in str(error.value)


@pytest.mark.parametrize("name", [name for name, row in CATALOG.items() if row.folders])
def test_empty_data_set_folder_is_a_user_error(name, tmp_path):
    (tmp_path / CATALOG[name].folders[0]).mkdir()
    with pytest.raises(UserError) as error:
        load_dataset(name, tmp_path, judged_split(name))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", [name for name in CATALOG if name not in DRAWN])
def test_split_file_of_another_shape_is_a_user_error(name, tmp_path):
    _, mini, root = build(name, tmp_path)
    folder = tmp_path / mini.folder
    for path in [path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".mat", ".csv")]:
        path.write_text("[1]")
    for path in folder.rglob("*.j*g" if name.startswith("imagenet-") else "*.JPEG"):
        path.unlink()
    if name == "folder":
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(UserError) as error:
        load_dataset(name, root, judged_split(name))
    assert str(tmp_path) in str(error.value)


def test_unknown_names_list_the_known(tmp_path):
    with pytest.raises(UserError, match=r"cifar.*caltech101.*coco"):
        load_dataset("cifar", tmp_path)
    with pytest.raises(UserError, match=r"dev.*train, val, test"):
        load_dataset("caltech101", tmp_path, "dev")
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("caltech101", tmp_path / "nowhere")


@pytest.mark.parametrize("name", [name for name, row in CATALOG.items() if row.draw])
def test_a_given_root_must_be_a_folder_even_where_nothing_is_read_from_it(name, tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{name}: --data-root {root} is not a folder"):
            load_dataset(name, root, next(iter(CATALOG[name].splits)))


def test_without_root_the_assets_folder_is_taken(tmp_path, monkeypatch):
    build("pets", tmp_path / "data")
    monkeypatch.delenv("PATCHRANK_ASSETS", raising=False)
    with pytest.raises(UserError, match="--data-root"):
        load_dataset("pets")
    monkeypatch.setenv("PATCHRANK_ASSETS", str(tmp_path))
    assert len(load_dataset("pets", split="train").images) == 2
    with pytest.raises(UserError, match="--data-root"):
        load_dataset("folder")


def test_split_files_may_lie_in_a_shared_folder_but_the_own_one_wins(tmp_path):
    _, mini, root = build("pets", tmp_path)
    own = tmp_path / "oxford_pets" / mini.source
    (tmp_path / "splits").mkdir()
    shutil.move(own, tmp_path / "splits" / mini.source)
    assert [item.id for item in load_dataset("pets", root, "train").images] == ["images/b/2.jpg", "images/a/1.jpg"]
    own.write_text(json.dumps(dict(train=[["a/1.jpg", 0, "x"]], val=[], test=[])))
    assert [item.id for item in load_dataset("pets", root, "train").images] == ["images/a/1.jpg"]


def test_the_data_set_folder_itself_may_be_the_root(tmp_path):
    _, _, root = build("pets", tmp_path)
    assert load_dataset("pets", root / "oxford_pets").images == load_dataset("pets", root).images


def test_missing_pictures_are_listed_and_keep_the_others_in_place(tmp_path, caplog):
    _, mini, root = build("pets", tmp_path)
    (tmp_path / mini.folder / "images/b/2.jpg").unlink()
    dataset = load_dataset("pets", root, "train")
    assert dataset.missing == ["images/b/2.jpg"]
    assert [(item.id, item.label) for item in dataset.images] == [("images/a/1.jpg", 0)]
    assert dataset.class_names == ["ant", "big cat"]
    assert "1 of 2" in caplog.text
    (tmp_path / mini.folder / "images/a/1.jpg").unlink()
    with pytest.raises(UserError, match="no picture"):
        load_dataset("pets", root, "train")


def test_a_compressed_archive_is_pointed_at(tmp_path):
    (tmp_path / "dtd.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="unpack it first"):
        load_dataset("dtd", tmp_path)


@pytest.mark.parametrize(
    ("name", "layout", "split", "known"),
    [
        ("pets", "pets, official", "val", "train, test"),
        ("food101", "food101, official", "val", "train, test"),
        ("coco", "coco, 2017", "test", "val"),
        ("folder", "folder with splits", "val", "train, test"),
        ("folder", "flat folder", "train", "all"),
    ],
)
def test_a_split_that_the_files_lack_lists_those_they_have(name, layout, split, known, tmp_path):
    _, _, root = build(layout, tmp_path)
    with pytest.raises(UserError, match=f"split '{split}'.*defines {known};"):
        load_dataset(name, root, split)


def test_folder_refuses_pictures_beside_class_folders(tmp_path):
    write(tmp_path, pictures("a/1.jpg", "2.jpg"))
    with pytest.raises(UserError, match=r"2\.jpg"):
        load_dataset("folder", tmp_path)


def test_nothing_is_written_to_the_data_root(tmp_path):
    _, _, root = build("tiny-imagenet", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    dataset = load_dataset("tiny-imagenet", root, "val")
    for item in dataset.images:
        dataset.open(item.id)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("pets", "pets, official"),
        ("flowers102", "flowers102, official"),
        ("food101", "food101, official"),
        ("dtd", "dtd, official"),
        ("ucf101", "ucf101, official"),
    ],
)
def test_official_splits_on_request(name, layout, tmp_path):
    """Both layouts in one folder: CoOp's is the default, the official one is there for protocols that want it."""
    _, mini, root = build(layout, tmp_path)
    _, other, _ = build(name, tmp_path / "other")
    write(tmp_path / mini.folder, other.files)
    split = "train"
    assert load_dataset(name, root, split).split_source == other.source
    official = load_dataset(name, root, split, official=True)
    assert official.split_source.startswith(mini.source)
    assert [(item.id, item.label) for item in official.images] == mini.items[split]


def test_official_caltech_draws_thirty_of_each_class(tmp_path):
    files = {
        f"101_ObjectCategories/{name}/{n:04d}.jpg": b"" for name in ("BACKGROUND_Google", "ant") for n in range(33)
    }
    write(tmp_path / "caltech-101", files)
    train, test = (load_dataset("caltech101", tmp_path, split, official=True) for split in ("train", "test"))
    assert train.class_names == ["ant", "background google"]
    assert [sum(item.label == label for item in train.images) for label in (0, 1)] == [30, 30]
    assert sorted(item.id for item in train.images + test.images) == sorted(files)
    again = load_dataset("caltech101", tmp_path, "train", official=True)
    assert again.images == train.images
    with pytest.raises(UserError, match="split 'val'"):
        load_dataset("caltech101", tmp_path, "val", official=True)
    (tmp_path / "caltech-101/101_ObjectCategories/few").mkdir()
    (tmp_path / "caltech-101/101_ObjectCategories/few/1.jpg").touch()
    with pytest.raises(UserError, match="fewer than 31"):
        load_dataset("caltech101", tmp_path, "train", official=True)


def test_imagenet_v2_refuses_a_folder_that_is_no_label(tmp_path):
    write(tmp_path / "imagenet-v2", pictures("1000/a.jpeg"))
    with pytest.raises(UserError, match="0 to 999"):
        load_dataset("imagenet-v2", tmp_path)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_variants_know_their_classes_where_folders_are_missing(name, tmp_path):
    build(name, tmp_path)
    dataset = load_dataset(name, tmp_path)
    assert len(dataset.class_names) == 200 and len(set(dataset.class_names)) == 200
