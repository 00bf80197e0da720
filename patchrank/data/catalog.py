"""All data sets in one table: where the files lie, how they are read, what the prompts are.

Adding a data set = one row here, with at most one small reader function. Nothing is downloaded or written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from patchrank.data import prompts
from patchrank.data.caption_readers import captions, read_coco, read_flickr8k
from patchrank.data.coop_readers import (
    coop,
    read_aircraft,
    read_caltech,
    read_dtd,
    read_flowers,
    read_food,
    read_pets,
    read_ucf,
)
from patchrank.data.digits import draw_digit, read_digits
from patchrank.data.digits_variants import VARIANTS, draw_variant, read_digit_pairs
from patchrank.data.folder_reader import read_folder
from patchrank.data.imagenet_readers import read_imagenet, read_tiny_imagenet
from patchrank.data.imagenet_variants import (
    read_imagenet_a,
    read_imagenet_o,
    read_imagenet_r,
    read_imagenet_sketch,
    read_imagenet_v2,
)
from patchrank.data.listing import Reader
from patchrank.data.sugarcrepe_reader import CATEGORIES, read_sugarcrepe

_COOP = "CoOp's split file: https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_TRAIN_VAL = {"train": "train", "val": "val", "test": "val"}
_TEST = {"test": "test"}
_ROBUST = "https://github.com/hendrycks"


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """Everything the library knows about one data set."""

    folders: tuple[str, ...] = ()
    """Names under the data root, the official first; each also as <name>.tar, read unpacked. Empty: the root itself."""
    read: Reader
    official: Reader | None = None
    """Reader of the official splits, where `read` prefers CoOp's; None where `read` gives them."""
    draw: Callable[[str], Image.Image] | None = None
    """Id -> picture, for a data set without files."""
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "val": "val", "test": "test"})
    """Split asked for -> split read; where test labels are not public, "test" is val, as in the papers."""
    template: str = prompts.PHOTO
    ensemble: tuple[str, ...] = ()
    """OpenAI's prompts; empty stands for the 80 of ImageNet."""
    layout: str
    """What the official folder holds, for error messages."""
    source: str
    """Where the official files come from."""


CATALOG: dict[str, DatasetRow] = {
    "digits": DatasetRow(
        read=read_digits,
        draw=draw_digit,
        template=prompts.DIGIT,
        ensemble=prompts.DIGIT_ENSEMBLE,
        layout="nothing: canvases are drawn from scikit-learn's bundled handwriting",
        source="scikit-learn",
    ),
    "folder": DatasetRow(
        read=read_folder,
        splits={"all": "all", "train": "train", "val": "val", "test": "test"},
        layout="<class>/*.jpg, or *.jpg without labels; optionally inside train/, val/, test/",
        source="your own pictures",
    ),
    "caltech101": DatasetRow(
        folders=("caltech-101",),
        read=coop("split_zhou_Caltech101.json", "101_ObjectCategories"),
        official=read_caltech,
        ensemble=prompts.OBJECT_ENSEMBLE,
        layout="101_ObjectCategories/<class>/*.jpg, split_zhou_Caltech101.json",
        source=f"https://data.caltech.edu/records/mzrjq-6wc02 and {_COOP}",
    ),
    "pets": DatasetRow(
        folders=("oxford_pets", "oxford-iiit-pet"),
        read=coop("split_zhou_OxfordPets.json", "images", read_pets),
        official=read_pets,
        template=prompts.PET,
        ensemble=prompts.PET_ENSEMBLE,
        layout="images/*.jpg, annotations/, split_zhou_OxfordPets.json",
        source=f"https://www.robots.ox.ac.uk/~vgg/data/pets/ and {_COOP}",
    ),
    "flowers102": DatasetRow(
        folders=("oxford_flowers", "flowers-102"),
        read=coop("split_zhou_OxfordFlowers.json", "jpg", read_flowers),
        official=read_flowers,
        template=prompts.FLOWER,
        ensemble=prompts.FLOWER_ENSEMBLE,
        layout="jpg/*.jpg, imagelabels.mat, setid.mat, cat_to_name.json, split_zhou_OxfordFlowers.json",
        source=f"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ and {_COOP}",
    ),
    "food101": DatasetRow(
        folders=("food-101", "food-101-64px"),
        read=coop("split_zhou_Food101.json", "images", read_food),
        official=read_food,
        template=prompts.FOOD,
        ensemble=prompts.FOOD_ENSEMBLE,
        layout="images/<class>/*.jpg, meta/train.json, meta/test.json, split_zhou_Food101.json",
        source=f"https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/ and {_COOP}",
    ),
    "aircraft": DatasetRow(
        folders=("fgvc_aircraft", "fgvc-aircraft-2013b"),
        read=read_aircraft,
        template=prompts.AIRCRAFT,
        ensemble=prompts.AIRCRAFT_ENSEMBLE,
        layout="images/*.jpg, variants.txt, images_variant_{train,val,test}.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    "dtd": DatasetRow(
        folders=("dtd",),
        read=coop("split_zhou_DescribableTextures.json", "images", read_dtd),
        official=read_dtd,
        template=prompts.TEXTURE,
        ensemble=prompts.TEXTURE_ENSEMBLE,
        layout="images/<class>/*.jpg, labels/, split_zhou_DescribableTextures.json",
        source=f"https://www.robots.ox.ac.uk/~vgg/data/dtd/ and {_COOP}",
    ),
    "ucf101": DatasetRow(
        folders=("ucf101",),
        read=coop("split_zhou_UCF101.json", "UCF-101-midframes", read_ucf),
        official=read_ucf,
        template=prompts.ACTION,
        ensemble=prompts.ACTION_ENSEMBLE,
        layout="UCF-101-midframes/<Class_Name>/*.jpg, split_zhou_UCF101.json",
        source=f"https://www.crcv.ucf.edu/data/UCF101.php; mid-frames and {_COOP}",
    ),
    "imagenet": DatasetRow(
        folders=("imagenet", "imagenet-1k", "ILSVRC2012"),
        read=read_imagenet,
        splits=_TRAIN_VAL,
        layout="train/<wnid>/*.JPEG, val/<wnid>/*.JPEG (or both below images/)",
        source="https://image-net.org",
    ),
    "imagenet-v2": DatasetRow(
        folders=("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2"),
        read=read_imagenet_v2,
        splits=_TEST,
        layout="<0 .. 999>/*.jpeg",
        source="https://github.com/modestyachts/ImageNetV2",
    ),
    "imagenet-a": DatasetRow(
        folders=("imagenet-a",),
        read=read_imagenet_a,
        splits=_TEST,
        layout="<wnid>/*.jpg of 200 classes",
        source=f"{_ROBUST}/natural-adv-examples",
    ),
    "imagenet-o": DatasetRow(
        folders=("imagenet-o",),
        read=read_imagenet_o,
        splits=_TEST,
        layout="<wnid>/*.jpg of 200 classes",
        source=f"{_ROBUST}/natural-adv-examples",
    ),
    "imagenet-r": DatasetRow(
        folders=("imagenet-r", "imagenet-rendition"),
        read=read_imagenet_r,
        splits=_TEST,
        layout="<wnid>/*.jpg of 200 classes (or below imagenet-r/)",
        source=f"{_ROBUST}/imagenet-r",
    ),
    "imagenet-sketch": DatasetRow(
        folders=("imagenet-sketch", "ImageNet-Sketch", "sketch"),
        read=read_imagenet_sketch,
        splits=_TEST,
        layout="<wnid>/*.JPEG of 1,000 classes (or below sketch/ or images/)",
        source="https://github.com/HaohanWang/ImageNet-Sketch",
    ),
    "tiny-imagenet": DatasetRow(
        folders=("tiny-imagenet-200", "tiny-imagenet", "tiny-imagenet-64px"),
        read=read_tiny_imagenet,
        splits=_TRAIN_VAL,
        layout="train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt, wnids.txt, words.txt",
        source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    "flickr8k": DatasetRow(
        folders=("flickr8k",),
        read=captions("dataset_flickr8k.json", ("Flicker8k_Dataset", "images", "Images"), read_flickr8k),
        layout="Flicker8k_Dataset/*.jpg, Flickr8k.token.txt, Flickr_8k.{train,dev,test}Images.txt",
        source=f"https://hockenmaier.cs.illinois.edu/8k-pictures.html or {_KARPATHY}",
    ),
    "flickr30k": DatasetRow(
        folders=("flickr30k",),
        read=captions("dataset_flickr30k.json", ("flickr30k-images", "flickr30k_images", "images", "Images")),
        layout="flickr30k-images/*.jpg, dataset_flickr30k.json",
        source=f"https://shannon.cs.illinois.edu/DenotationGraph/ and {_KARPATHY}",
    ),
    "coco": DatasetRow(
        folders=("coco", "mscoco"),
        read=captions("dataset_coco.json", ("", "images"), read_coco),
        layout="train2014/, val2014/ and dataset_coco.json, or train2017/, val2017/ and annotations/",
        source=f"https://cocodataset.org/#download and {_KARPATHY}",
    ),
    "sugarcrepe": DatasetRow(
        folders=("sugar-crepe", "sugar_crepe", "sugarcrepe", "coco", "mscoco"),
        read=read_sugarcrepe,
        splits={category: category for category in CATEGORIES},
        layout="data/<category>.json beside COCO's val2017/*.jpg",
        source="https://github.com/RAIVNLab/sugar-crepe and https://cocodataset.org/#download",
    ),
    "digits-pairs": DatasetRow(
        read=read_digit_pairs,
        draw=draw_digit,
        splits={category: category for category in ("replace_obj", "replace_att", "replace_rel")},
        template=prompts.DIGIT,
        ensemble=prompts.DIGIT_ENSEMBLE,
        layout="nothing: the canvases of digits, each with a right and a wrong caption",
        source="scikit-learn",
    ),
} | {
    f"digits-{name}": DatasetRow(
        read=read_digits,
        draw=draw_variant(name),
        template=prompts.DIGIT,
        ensemble=prompts.DIGIT_ENSEMBLE,
        layout=f"nothing: the canvases of digits, {text}",
        source="scikit-learn",
    )
    for name, text in VARIANTS.items()
}
