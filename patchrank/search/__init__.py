"""Golden rankings of patches: criteria, strategies, the ranking store, pictures; `python -m patchrank.search`.

`search(...)` is the command as a function. The package can be called too, so that `patchrank.search(...)` and
`patchrank.search.store` both work although they share one name.
"""

import sys
from types import ModuleType

from patchrank.search.store import RankingMismatch, RankingStore, open_store

__all__ = ["RankingMismatch", "RankingStore", "open_store", "search"]


def search(clip=None, dataset=None, *, quiet: bool = True, **settings) -> RankingStore | None:
    """Rank the patches of a data set's images; resumes a store that the same call began.

    Args: clip, a `LoadedClip`, or None to load the settings' `model` and `pretrained`; dataset, a `Dataset`, or None
    to load `data`; quiet=False shows a progress bar; settings: fields of `SearchConfig`, such as limit=100,
    strategy="sweep", out="out/pets".
    Returns: the complete store, also on disk under `out`; None on a rank of torchrun that finishes before the others.
    Raises: UserError for a value outside its rule; RankingMismatch for a store that another search began.
    """
    from patchrank.search.call import run

    return run(clip, dataset, quiet, settings)


class _CallablePackage(ModuleType):
    def __call__(self, *args, **settings) -> RankingStore | None:
        return search(*args, **settings)


sys.modules[__name__].__class__ = _CallablePackage
