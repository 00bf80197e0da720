"""`Preprocess` bit by bit against open_clip's and timm's own evaluation transforms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.torchvision_shim import ensure_torchvision

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90)).filter(lambda size: max(size) <= 20 * min(size))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("image_size", "mode"), [(32, "shortest"), (33, "shortest"), ((24, 40), "shortest"), ((24, 40), "squash")]
)
@settings(max_examples=25, deadline=None)
@given(size=SIZES, channels=st.sampled_from(["RGB", "L", "RGBA", "CMYK"]))
def test_equals_open_clip(image_size, mode, interpolation, size, channels):
    ensure_torchvision()
    from open_clip.transform import image_transform

    if mode == "shortest" and isinstance(image_size, tuple):
        interpolation = "bicubic"  # open_clip ignores the setting there
    theirs = image_transform(
        image_size, is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation=interpolation
    )
    crop = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    ours = Preprocess(image_size=crop, resize=image_size, mode=mode, interpolation=interpolation, mean=MEAN, std=STD)
    # open_clip converts after the resize; for grey pictures that is the same, for alpha and CMYK it is not.
    image = picture(*size, channels)
    expected = theirs(image if channels in ("RGB", "L") else image.convert("RGB"))
    torch.testing.assert_close(ours(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("image_size", "crop_pct"), [((224, 224), 0.875), ((32, 32), 0.9), ((24, 40), 0.9)])
@settings(max_examples=10, deadline=None)
@given(size=SIZES)
def test_equals_timm(image_size, crop_pct, interpolation, size):
    ensure_torchvision()
    from timm.data.transforms_factory import transforms_imagenet_eval

    theirs = transforms_imagenet_eval(image_size, crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD)
    resize = tuple(int(side / crop_pct) for side in image_size)
    ours = Preprocess(image_size=image_size, resize=resize, interpolation=interpolation, mean=MEAN, std=STD)
    image = picture(*size)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_hand_made_values():
    """Left half black, right half white, no resampling: the crop takes the middle, the channels their own mean."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 2:] = 255
    ours = Preprocess(image_size=(2, 2), resize=2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    result = ours(Image.fromarray(pixels))
    assert result.dtype == torch.float32 and result.shape == (3, 2, 2)
    assert result[:, 0].tolist() == [[0, 1], [-1, 1], [-4, 0]]


@pytest.mark.parametrize("resize", [40, (40, 48)])
def test_dict_round_trip(resize):
    ours = Preprocess(image_size=(32, 36), resize=resize, mode="squash", mean=MEAN, std=STD)
    assert Preprocess.from_dict(ours.to_dict()) == ours
    assert not any(isinstance(value, tuple) for value in ours.to_dict().values())
    with pytest.raises(UserError, match="expected"):
        Preprocess.from_dict({"resize": 3})


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"mode": "longest"}, "squash"), ({"interpolation": "lanczos"}, "bilinear"), ({"resize": 31}, "cover")],
)
def test_bad_values(changes, word):
    with pytest.raises(UserError, match=word):
        Preprocess(**(dict(image_size=(32, 32), resize=32, mean=MEAN, std=STD) | changes))
