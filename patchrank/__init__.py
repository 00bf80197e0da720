"""patchrank: a frozen CLIP image tower that looks at fewer patches and keeps its zero-shot answers."""

__version__ = "0.1.0"

from patchrank import search
from patchrank.apply import apply
from patchrank.loading import load_clip
from patchrank.pruned import PrunedTower
from patchrank.spec import PruneSpec

__all__ = ["PruneSpec", "PrunedTower", "__version__", "apply", "load_clip", "search"]
