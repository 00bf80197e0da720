"""Lets `import torchvision` succeed beside a torch that its compiled part was not built for.

On a CPU torch, PyPI's torchvision (built for CUDA) stops at import with "operator torchvision::nms does not exist", and
open_clip and timm with it. Declaring the two missing operator schemas is enough: patchrank calls neither operator.
"""

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A library object undoes its declarations when it is collected, so it lives as long as the process.
_declared: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Import torchvision, declaring its missing operator schemas if, and only if, the plain import fails.

    Raises: whatever the import raises for any other reason, such as torchvision not being installed.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    importlib.import_module("torchvision")
