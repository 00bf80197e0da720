"""WebDataset shards as a stream that goes on exactly where it stopped: a run on tar files too many to index.

A sample is a picture (.jpg, .png, .webp, ...) with captions of the same key: .txt (one a line) or .json with "caption"
or "captions". The order is a function of the seed: shards are permuted anew every epoch, dealt out to the processes,
and shuffled through a buffer; going on means reading past what was seen, without decoding it.
Reading is the `webdataset` library's work.
"""

import io
import itertools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from patchrank.errors import UserError
from patchrank.pretrain.distributed import World
from patchrank.pretrain.draws import generator

logger = logging.getLogger(__name__)

Captioned = tuple[Image.Image, tuple[str, ...]]
"""RGB picture and its captions."""

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")


def shard_paths(root: str | Path | None) -> list[str]:
    """Files of a folder of *.tar, or of a name with braces such as "data/{000..099}.tar".

    Raises: UserError for no webdataset library, no shards, or one that is not there.
    """
    if root is None:
        raise UserError("--data shards: no --data-root given; name a folder of *.tar, or files as data/{000..099}.tar")
    if Path(root).is_dir():
        paths = sorted(map(str, Path(root).glob("*.tar")))
    else:
        try:
            paths = list(_library().shardlists.expand_urls(str(root)))
        except ValueError as error:
            raise UserError(f"--data-root {root}: {error}; write braces as data/{{000..099}}.tar") from None
    absent = [path for path in paths if not Path(path).is_file()]
    if absent or not paths:
        raise UserError(f"--data-root {root}: {absent[0] if absent else '*.tar'} not found; name a folder of *.tar")
    return paths


def _library():
    try:
        import webdataset
    except ImportError as error:
        raise UserError("--data shards: needs webdataset; pip install 'patchrank[pretrain]'") from error
    return webdataset


class ShardStream:
    """Samples of this process in order, from any place on.

    Args: buffer, samples held back for shuffling.
    Raises: UserError for fewer shards than processes.
    """

    name = "shards"

    def __init__(self, paths: Sequence[str], seed: int, world: World, buffer: int = 1000) -> None:
        if len(paths) < world.size:
            raise UserError(f"--data-root: {len(paths)} shards for {world.size} processes; write at least one for each")
        self._paths, self._seed, self._world, self._buffer = list(paths), seed, world, buffer
        self._place, self._samples = 0, self._all()
        self._last: tuple[int, int, list[Captioned | None]] = (0, 0, [])
        self.broken: dict[str, str] = {}
        """Sample -> why it cannot be used; shard -> where it is damaged. So far."""

    @property
    def names(self) -> list[str]:
        """Files of the stream."""
        return [Path(path).name for path in self._paths]

    def take(self, start: int, num: int) -> list[Captioned | None]:
        """Samples start .. start + num - 1 of this process; None for one that `broken` tells of.

        Going forwards reads on; the last ones are still there; going further back begins again.
        """
        if self._last[:2] == (start, num):
            return self._last[2]
        if start < self._place:
            self._place, self._samples = 0, self._all()
        for _ in itertools.islice(self._samples, start - self._place):
            pass
        self._place = start + num
        self._last = start, num, [self._decoded(sample) for sample in itertools.islice(self._samples, num)]
        return self._last[2]

    def _all(self) -> Iterator[dict]:
        """Raw samples of all epochs, without end."""
        for epoch in itertools.count():
            num = 0
            for sample in self._epoch(epoch):
                num += 1
                yield sample
            if num == 0:
                raise UserError(f"--data-root: no sample in {self._paths[0]} and the others; they must hold pictures")

    def _epoch(self, epoch: int) -> Iterator[dict]:
        library = _library()
        order = torch.randperm(len(self._paths), generator=generator(self._seed, "shards", epoch)).tolist()
        # with a number of shards that does not divide, the first ones of the permutation are dealt again
        num = -(-len(order) // self._world.size) * self._world.size
        dealt = (order + order)[:num]
        own = [self._paths[number] for number in dealt[self._world.rank :: self._world.size]]
        chance = random.Random(f"{self._seed} {epoch} {self._world.rank}")
        return iter(
            library.DataPipeline(
                library.SimpleShardList(own),
                library.tarfile_to_samples(handler=self._damaged),
                library.shuffle(self._buffer, initial=self._buffer, rng=chance),
            )
        )

    def _damaged(self, error: Exception) -> bool:
        """Tell of a shard that does not read to its end, once, and go on with the next one."""
        said = [str(arg) for arg in error.args] or [""]
        path = next((path for path in self._paths if path in " ".join(said)), "a shard")
        if path not in self.broken:
            self.broken[path] = f"{type(error).__name__}: {said[0].partition(' @ ')[0]}"
            logger.warning("%s is damaged (%s): what stands before is used", path, self.broken[path])
        return True

    def _decoded(self, sample: dict) -> Captioned | None:
        try:
            return _picture(sample), _captions(sample)
        except Exception as error:  # decoders answer damaged bytes with almost any exception
            self.broken[sample.get("__key__", "?")] = f"{type(error).__name__}: {error}"
            return None


def _picture(sample: dict) -> Image.Image:
    data = next((sample[suffix] for suffix in _PICTURES if suffix in sample), None)
    if data is None:
        raise ValueError("holds no picture")
    return Image.open(io.BytesIO(data)).convert("RGB")


def _captions(sample: dict) -> tuple[str, ...]:
    if "txt" in sample:
        lines = sample["txt"].decode("utf-8", "replace").splitlines()
    else:
        row = json.loads(sample.get("json", b"{}"))
        found = row.get("captions", row.get("caption", ()))
        lines = [found] if isinstance(found, str) else list(found)
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ValueError("has no caption")
    return captions
