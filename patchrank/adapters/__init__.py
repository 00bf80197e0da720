"""One adapter per model library: how its models give up their image tower and take a pruned one in its place.

Every adapter is a module with three functions:
    tower(model) -> VisionTower        a copy of the image tower; refuses what it cannot run, by name
    attach(model, pruned) -> model     a copy of the model that runs `pruned`; the model itself is left alone
    cost(config, spec) -> int          MACs of the image tower of such a copy
"""

ADAPTERS = {
    "open_clip": "patchrank.adapters.open_clip_models",
    "timm": "patchrank.adapters.timm_models",
    "transformers": "patchrank.adapters.hf_models",
}
"""Top-level package of a model's class -> its adapter, imported at first use: an absent library costs nothing."""
