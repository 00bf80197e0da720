"""`python -m patchrank.search`: golden rankings of a data set into a store, then a table and pictures."""

from patchrank import cli
from patchrank.atomic import write_json
from patchrank.provenance import command, versions
from patchrank.search.config import SearchConfig, check
from patchrank.search.cost import cost_line
from patchrank.search.plan import Plan, make_plan, place, threads
from patchrank.search.report import write_pictures, write_table
from patchrank.search.runner import num_left, run_search
from patchrank.search.store import check_request, is_complete, open_store


def main(config: SearchConfig) -> None:
    """Search as `config` says; under torchrun each rank takes every world-th shard and the last to finish reports."""
    check(config)
    try:
        with threads(config.threads):
            _search(config)
    except OSError as error:
        error.filename = error.filename or str(config.out)  # writes into a full disk do not say where
        raise


def _search(config: SearchConfig) -> None:
    rank, world = place()
    plan = make_plan(config)
    check_request(config.out, plan.request)
    if is_complete(config.out, plan.request):
        if rank == 0:
            print(f"{config.out}: this search is complete, nothing to compute")
            if not config.dry_run:
                _report(config, plan)
        return
    if rank == 0:
        left = num_left(plan.items, config.shard_size, config.out)
        print(cost_line(plan.job, len(plan.items), left, world), flush=True)
    if config.dry_run:
        return
    if rank == 0:
        resolved = config.to_dict() | {"layer": plan.request["layer"], "threads": plan.request["threads"]}
        origin = {"command": command("patchrank.search"), "versions": versions()}
        write_json(config.out / "config.json", resolved | origin)
    if run_search(plan.job, plan.items, plan.request, config.out, rank=rank, world=world):
        _report(config, plan)


def _report(config: SearchConfig, plan: Plan) -> None:
    store = open_store(config.out, weights_hash=plan.clip.weights_hash, layer=plan.request["layer"])
    if plan.note:
        print(f"no class answers: {plan.note}")
    if store.broken:
        were = "image was" if len(store.broken) == 1 else "images were"
        print(f"{len(store.broken)} broken {were} skipped: {_first(store.broken)}")
    if not store.ids:
        print(f"{config.out}: every image was broken, so there is no table")
        return
    print(write_table(config.out, plan, store, config.keep))
    written = write_pictures(config.out, plan, store, config.keep, config.explain) if config.explain else []
    print(f"rankings of {len(store.ids)} images, results.json and results.csv in {config.out}")
    if written:
        print(f"picture sheets ({len(written) - 1}) and overview.png in {written[-1].parent}")


def _first(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more (all in manifest.json)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    cli.run(main, SearchConfig, prog="python -m patchrank.search")
