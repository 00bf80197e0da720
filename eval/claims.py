"""`python -m eval claims`: the claims of the three papers, as reported and as measured here; reads files only."""

from dataclasses import dataclass
from pathlib import Path

from eval import claims_patch_ranking, claims_pretraining
from eval.claims_files import Files
from eval.claims_print import markdown_page, text_table
from eval.claims_rows import Claim, row_of
from patchrank.atomic import write_json, write_text
from patchrank.errors import UserError
from patchrank.provenance import command, versions


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """The claims of Patch Ranking, A-CLIP and CLIP-PGS: reported, ours, interval, verdict, why; runs no model."""

    results: Path = Path("docs/results")
    """Folder of search_cost.json, search_truth.json, export_bench.json, pretrain_*.json, prompt.json and eval/."""
    out: Path | None = None
    """Folder of claims.json and claims.md; without it --results."""


def all_claims() -> list[Claim]:
    """Of all papers, in their order."""
    return [*claims_patch_ranking.claims(), *claims_pretraining.claims()]


def main(config: ClaimsConfig) -> None:
    """Judge every claim by its rule, write both files, print the table."""
    if not config.results.is_dir():
        raise UserError(f"--results {config.results}: no such folder; name the one that holds the result files")
    files = Files(config.results)
    rows = [row_of(claim, files) for claim in all_claims()]
    folder = config.out or config.results
    said = command("eval")
    write_json(folder / "claims.json", {"command": said, "versions": versions(), "rows": rows})
    write_text(folder / "claims.md", markdown_page(rows, said))
    print(text_table(rows))
    print(f"claims.json and claims.md in {folder}")
