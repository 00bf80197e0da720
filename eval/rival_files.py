"""Trained or searched files that some rows of the rivals' table need, as flags say them."""

from collections.abc import Sequence
from pathlib import Path

from eval.rivals import FILES
from patchrank.errors import UserError


def parse_files(words: Sequence[str]) -> dict[str, Path]:
    """'dtem=out/dtem' ... -> {"dtem": Path("out/dtem")}.

    Raises: UserError for another form, a name that no row needs, or a path that is not there.
    """
    files = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in FILES:
            raise UserError(f"--files {word}: must be name=path with a name among {', '.join(FILES)}")
        if not Path(path).exists():
            raise UserError(f"--files {word}: {path} does not exist; it should hold {FILES[name]}")
        files[name] = Path(path)
    return files
