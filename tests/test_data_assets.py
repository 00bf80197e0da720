"""The real data sets of the assets folder: official counts, labels and every file present."""

import collections
import json

import pytest

from patchrank.data import CATALOG, batches, few_shot, load_dataset
from patchrank.data.files import FilesWithSplits, FolderFiles
from patchrank.preprocess import Preprocess

pytestmark = pytest.mark.assets


@pytest.mark.parametrize(
    ("name", "split", "num_images", "num_classes"),
    [
        ("caltech101", "train", 4128, 100),
        ("caltech101", "val", 1649, 100),
        ("caltech101", "test", 2465, 100),
        ("food101", "train", 10100, 101),
        ("food101", "test", 2020, 101),
        ("tiny-imagenet", "train", 10000, 200),
        ("tiny-imagenet", "val", 5000, 200),
        ("flickr8k", "train", 6000, 0),
        ("flickr8k", "val", 1000, 0),
        ("flickr8k", "test", 1000, 0),
    ],
)
def test_official_counts(assets, name, split, num_images, num_classes):
    dataset = load_dataset(name, assets / "data", split)
    assert (len(dataset.images), len(dataset.class_names), dataset.missing) == (num_images, num_classes, [])
    assert len({item.id for item in dataset.images}) == num_images
    if num_classes:
        assert {item.label for item in dataset.images} == set(range(num_classes))
    else:
        assert all(len(item.captions) == 5 for item in dataset.images)
    for item in dataset.images[:: num_images // 5]:
        assert min(dataset.open(item.id).size) >= 32


def test_tiny_imagenet_follows_the_head(assets):
    dataset = load_dataset("tiny-imagenet", assets / "data", "val")
    assert set(collections.Counter(item.label for item in dataset.images).values()) == {25}
    assert dataset.class_names[0] == "goldfish" and dataset.class_names[-1] == "orange"
    assert dataset.images[0].id.startswith("val/n01443537/") and dataset.images[0].label == 0


@pytest.mark.parametrize("name", ["caltech101", "food101", "tiny-imagenet"])
def test_ids_and_labels_agree(assets, name):
    """One class folder holds one label only."""
    folders = collections.defaultdict(set)
    for item in load_dataset(name, assets / "data", "train").images:
        folders[item.id.rsplit("/", 1)[0]].add(item.label)
    assert all(len(labels) == 1 for labels in folders.values())
    assert len({label for labels in folders.values() for label in labels}) == len(folders)


@pytest.mark.parametrize(
    ("name", "counts", "num_classes"),
    [
        ("pets", (2944, 736, 3669), 37),
        ("dtd", (2820, 1128, 1692), 47),
        ("flowers102", (4093, 1633, 2463), 102),
        ("ucf101", (7639, 1898, 3783), 101),
    ],
)
def test_real_split_files(assets, tmp_path, name, counts, num_classes):
    files = FilesWithSplits(FolderFiles(tmp_path), assets / "data" / "splits")
    listings = [CATALOG[name].read(files, split) for split in ("train", "val", "test")]
    assert tuple(len(listing.items) for listing in listings) == counts
    assert len(listings[0].class_names) == num_classes
    assert not any("_" in class_name for class_name in listings[0].class_names)


def test_few_shot_of_a_real_split(assets):
    dataset = few_shot(load_dataset("caltech101", assets / "data", "train"), 16, 1)
    assert set(collections.Counter(item.label for item in dataset.images).values()) == {16}


def test_batches_of_real_pictures(assets):
    preprocess = Preprocess(image_size=(224, 224), resize=256, mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = load_dataset("tiny-imagenet", assets / "data", "val")
    broken: list[str] = []
    (ids, image_BCHW, label_B), (more_ids, _, _) = batches(dataset, preprocess, 4, 24, 30, broken)
    assert broken == []
    assert ids + more_ids == [item.id for item in dataset.images[24:30]]
    assert image_BCHW.shape == (4, 3, 224, 224) and label_B.tolist() == [0, 1, 1, 1]
    assert -1 <= image_BCHW.min() < image_BCHW.max() <= 1


def test_folder_row_reads_a_real_tar(assets):
    dataset = load_dataset("folder", assets / "data" / "tiny-imagenet-64px.tar", "val")
    classes = json.loads(dataset.read("classes.json"))
    assert dataset.class_names == sorted(row["wnid"] for row in classes)
    assert len(dataset.images) == 5000


def test_official_caltech_has_all_102_classes(assets):
    train, test = (load_dataset("caltech101", assets / "data", split, official=True) for split in ("train", "test"))
    assert (len(train.images), len(test.images), len(test.class_names)) == (3060, 6084, 102)
    assert test.class_names[:5] == ["accordion", "airplanes", "anchor", "ant", "background google"]
    assert not {item.id for item in train.images} & {item.id for item in test.images}


def test_official_food_reads_beside_the_coop_row(assets):
    dataset = load_dataset("food101", assets / "data", "test", official=True)
    assert len(dataset.images) == 2020 and dataset.split_source == "meta/test.json"
