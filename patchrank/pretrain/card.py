"""What a saved model says about itself: how it was made, and a short model card in words."""

from pathlib import Path
from typing import Any

from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.state import Progress
from patchrank.provenance import command, machine, versions

_DATA = {
    "digits": "scikit-learn's bundled handwritten digits (UCI Optical Recognition of Handwritten Digits, 8 x 8) on "
    "cluttered 112-pixel canvases; train, val and test hold disjoint handwriting",
}


def recipe_of(
    config: PretrainConfig, progress: Progress, metrics: dict[str, dict[str, float]], num_test: dict[str, float]
) -> dict[str, Any]:
    """JSON values: command, settings, cost and metrics by split (fractions) of a finished run.

    Args: num_test: pictures behind the metrics of the test sets (`evaluate.num_tested`).
    """
    return {
        "command": command("patchrank.pretrain"),
        "settings": config.settings() | {name: _short(getattr(config, name)) for name in ("model", "pretrained")},
        "metrics": metrics,
        "num_test": num_test,
        "minutes": round(progress.seconds / 60, 1),
        "processor_minutes": round(progress.cpu_seconds / 60, 1),
        "processor_seconds": round(progress.cpu_seconds, 2),
        "machine": machine(),
        "versions": versions(),
    }


def _short(path: str) -> str:
    """A path without the folders of this machine; another name as it is."""
    return Path(path).name if Path(path).is_absolute() else path


def card(recipe: dict[str, Any]) -> str:
    """The model card: data, recipe, cost, accuracy, limits."""
    settings = recipe["settings"]
    found = [f"{name} {100 * value:.1f} % ({split})" for split, row in recipe["metrics"].items()
             for name, value in row.items()]  # fmt: skip
    locked = settings["recipe"] == "lit"
    image_tower = f"the image tower of {settings['model']}, locked and not in this file" if locked else "from scratch"
    kind = "Accuracy on classes whose captions it was trained on is not zero-shot. " if locked else ""
    return (
        f"Data: {_DATA.get(settings['data'], settings['data'])}. "
        f"Recipe: {settings['recipe']}, {image_tower}, {settings['num_steps']} steps of {settings['batch_size']} "
        f"pictures, seed {settings['seed']}. "
        f"Cost: {recipe['processor_minutes']:g} processor minutes on {settings['threads']} threads. "
        f"Zero-shot accuracy and retrieval before rounding to float16: {', '.join(found) or 'not measured'}. "
        f"{kind}"
        "Limits: it knows nothing but its training data; a default to try patchrank with, not a model to build on."
    )
