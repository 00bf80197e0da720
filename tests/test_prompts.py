"""The published prompts: numbers, spelling, one place for the class name."""

import pytest

from patchrank.data import CATALOG, Dataset, prompts
from patchrank.data.imagenet_readers import imagenet_names, imagenet_wnids

# Numbers of prompts in OpenAI's published list.
NUM_PUBLISHED = {
    "caltech101": 34,
    "pets": 1,
    "flowers102": 1,
    "food101": 1,
    "aircraft": 2,
    "dtd": 8,
    "ucf101": 48,
}


@pytest.mark.parametrize("name", CATALOG)
def test_every_prompt_has_one_place_for_the_class(name):
    row = CATALOG[name]
    for template in (row.template, *row.ensemble):
        assert template.count("{}") == 1
        assert template.replace("{}", "").isascii() and template.format("cat").count("cat") >= 1
    assert len(set(row.ensemble)) == len(row.ensemble)


@pytest.mark.parametrize("name", NUM_PUBLISHED)
def test_number_of_published_prompts(name):
    assert len(CATALOG[name].ensemble) == NUM_PUBLISHED[name]


def test_spelling_and_order_of_the_products():
    objects, actions, textures = prompts.OBJECT_ENSEMBLE, prompts.ACTION_ENSEMBLE, prompts.TEXTURE_ENSEMBLE
    assert objects[0] == "a photo of a {}." and objects[8] == "a embroidered {}." and objects[16] == "a doodle of a {}."
    assert objects[17] == "a photo of the {}." and objects[27] == "the {} in a video game."
    assert actions[0] == "a photo of a person {}." and actions[6] == "a example of the person {}."
    assert (
        actions[8] == "a photo of a person using {}." and actions[-1] == "a demonstration of the person practicing {}."
    )
    assert textures[1] == "a photo of a {} pattern." and textures[4] == "a photo of the {} texture."


def test_imagenet_ensemble_and_names():
    ensemble = prompts.imagenet_ensemble()
    assert len(set(ensemble)) == 80
    assert ensemble[0] == "a bad photo of a {}." and ensemble[-1] == "a tattoo of the {}."
    names, wnids = imagenet_names(), imagenet_wnids()
    assert len(names) == len(wnids) == 1000
    assert wnids == sorted(wnids)
    assert (wnids[0], names[0]) == ("n01440764", "tench") and (wnids[999], names[999]) == ("n15075141", "toilet paper")


def test_with_ensemble_takes_the_rows_own_or_imagenets():
    dataset = Dataset(name="x", split="test", images=[], read=bytes, ensemble=prompts.AIRCRAFT_ENSEMBLE)
    assert dataset.templates == ("a photo of a {}.",)
    assert dataset.with_ensemble().templates == prompts.AIRCRAFT_ENSEMBLE
    assert len(Dataset(name="x", split="test", images=[], read=bytes).with_ensemble().templates) == 80
