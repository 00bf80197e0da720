"""What a saved model says about itself: how it was made, and a short model card in words."""

from typing import Any

from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.state import Progress
from patchrank.provenance import command, machine, versions

_DATA = {
    "digits": "scikit-learn's bundled handwritten digits (UCI Optical Recognition of Handwritten Digits, 8 x 8) on "
    "cluttered 112-pixel canvases; train, val and test hold disjoint handwriting",
}


def recipe_of(config: PretrainConfig, progress: Progress, accuracy: dict[str, float]) -> dict[str, Any]:
    """JSON values: command, settings, cost and zero-shot accuracy (fractions) of a finished run."""
    return {
        "command": command("patchrank.pretrain"),
        "settings": config.settings(),
        "accuracy": accuracy,
        "minutes": round(progress.seconds / 60, 1),
        "processor_minutes": round(progress.cpu_seconds / 60, 1),
        "machine": machine(),
        "versions": versions(),
    }


def card(recipe: dict[str, Any]) -> str:
    """The model card: data, recipe, cost, accuracy, limits."""
    settings, accuracy = recipe["settings"], recipe["accuracy"]
    shown = ", ".join(f"{100 * value:.1f} % on {split}" for split, value in accuracy.items()) or "not measured"
    return (
        f"Data: {_DATA.get(settings['data'], settings['data'])}. "
        f"Recipe: {settings['recipe']} from scratch, {settings['num_steps']} steps of {settings['batch_size']} "
        f"pictures, seed {settings['seed']}. "
        f"Cost: {recipe['processor_minutes']:g} processor minutes on {settings['threads']} threads. "
        f"Zero-shot accuracy before rounding to float16: {shown}. "
        "Limits: it knows nothing but its training data; a default to try patchrank with, not a model to build on."
    )
