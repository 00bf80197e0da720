"""The search as a function call: what `patchrank.search.search` does."""

from dataclasses import fields, replace
from pathlib import Path

from patchrank.data import Dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.search.config import SearchConfig, check
from patchrank.search.plan import make_plan, place, threads
from patchrank.search.runner import run_search
from patchrank.search.store import RankingStore, is_complete, open_store

_CLI_ONLY = ("explain", "dry_run", "keep")


def run(clip: LoadedClip | None, dataset: Dataset | None, quiet: bool, settings: dict) -> RankingStore | None:
    """See `patchrank.search.search`."""
    known = [part.name for part in fields(SearchConfig) if part.name not in _CLI_ONLY]
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no setting of search; choose from {', '.join(known)}")
    config = SearchConfig(**{name: Path(value) if name == "out" else value for name, value in settings.items()})
    if clip is not None:
        config = replace(config, model=clip.model_name, pretrained=clip.pretrained)
    if dataset is not None:
        config = replace(config, data=dataset.name, split=dataset.split)
    check(config)
    rank, world = place()
    with threads(config.threads):
        plan = make_plan(config, clip, dataset)
        completed = run_search(plan.job, plan.items, plan.request, config.out, rank=rank, world=world, quiet=quiet)
    if completed or is_complete(config.out, plan.request):
        return open_store(config.out)
    return None
