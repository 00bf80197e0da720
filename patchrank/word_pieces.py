"""Words in pieces: CLIP's byte-pair encoding with its first merges only, so that a small text tower has a small table.

The list of merges is the one that open_clip brings along; frequent words come first in it, so a few thousand merges
keep those whole and a rare word falls into pieces that it shares with others.
"""

from functools import cache
from typing import Any

from patchrank.errors import UserError

NUM_LETTERS = 512
"""Pieces that are there without any merge: each byte inside a word, and each at its end."""
MAX_MERGES = 48_894


def num_pieces(num_merges: int) -> int:
    """Size of the table. Raises: UserError for more merges than there are."""
    if not 1 <= num_merges <= MAX_MERGES:
        raise UserError(f"num_merges={num_merges}: must be 1 to {MAX_MERGES:,}, the merges of CLIP's vocabulary")
    return NUM_LETTERS + num_merges


def word_pieces(text: str, num_merges: int) -> list[int]:
    """Pieces of a text in lower case, each 0 .. num_pieces(num_merges) - 1.

    Source: CLIP (Radford et al. 2021, section 2.4) and Sennrich et al. 2016, by open_clip's `SimpleTokenizer`.
    Deviation: merges beyond the first `num_merges` are not made.
    """
    return _tokenizer(num_merges).encode(text)


@cache
def _tokenizer(num_merges: int) -> Any:
    from patchrank.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    tokenizer.bpe_ranks = {pair: rank for pair, rank in tokenizer.bpe_ranks.items() if rank < num_merges}
    # the special tokens are words like others here: a caption cannot write one
    tokenizer.cache = {}
    return tokenizer
