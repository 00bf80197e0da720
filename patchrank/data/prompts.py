"""Prompts of zero-shot classification: CoOp's single one and OpenAI's ensemble for each data set.

Source: CoOp (Zhou et al. 2022), its zero-shot baseline's one hand-written prompt per data set; CLIP (Radford et al.
2021), the `prompts.md` published with it, in its order and spelling ("a embroidered", "a example" are theirs).
"""

PHOTO = "a photo of a {}."
PET = "a photo of a {}, a type of pet."
FLOWER = "a photo of a {}, a type of flower."
FOOD = "a photo of {}, a type of food."
AIRCRAFT = "a photo of a {}, a type of aircraft."
TEXTURE = "{} texture."
ACTION = "a photo of a person doing {}."
DIGIT = "a photo of the digit {}"

PET_ENSEMBLE = (PET,)
FLOWER_ENSEMBLE = (FLOWER,)
FOOD_ENSEMBLE = (FOOD,)
AIRCRAFT_ENSEMBLE = (AIRCRAFT, "a photo of the {}, a type of aircraft.")
DIGIT_ENSEMBLE = (DIGIT, 'a photo of the number: "{}".')

TEXTURE_ENSEMBLE = tuple(
    f"a photo of {article} {{}} {noun}."
    for article in ("a", "the")
    for noun in ("texture", "pattern", "thing", "object")
)

ACTION_ENSEMBLE = tuple(
    f"a {medium} of {article} person {verb}{{}}."
    for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for article in ("a", "the")
    for medium in ("photo", "video", "example", "demonstration")
)

OBJECT_ENSEMBLE = tuple(
    prompt.format(article=article)
    for article in ("a", "the")
    for prompt in (
        "a photo of {article} {{}}.",
        "a painting of {article} {{}}.",
        "{article} plastic {{}}.",
        "a sculpture of {article} {{}}.",
        "a sketch of {article} {{}}.",
        "a tattoo of {article} {{}}.",
        "{article} toy {{}}.",
        "a rendition of {article} {{}}.",
        "{article} embroidered {{}}.",
        "{article} cartoon {{}}.",
        "{article} {{}} in a video game.",
        "{article} plushie {{}}.",
        "{article} origami {{}}.",
        "art of {article} {{}}.",
        "graffiti of {article} {{}}.",
        "a drawing of {article} {{}}.",
        "a doodle of {article} {{}}.",
    )
)


def imagenet_ensemble() -> tuple[str, ...]:
    """OpenAI's 80 prompts for ImageNet, as open_clip ships them (imported on call: it takes seconds)."""
    from patchrank.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
