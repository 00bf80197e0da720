"""What `python -m export.bench` can be told."""

from dataclasses import dataclass
from pathlib import Path

from export.precision import PRECISIONS
from export.runtimes import check_runtimes
from export.tracing import OPSETS
from patchrank.errors import UserError

VARIANTS = ("drop-1", "fold-1", "fold-4", "accurate")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure how much of the saved compute arrives as speed."""

    model: str = "embedded"
    """A model as in the other commands, or a shape with random weights: ViT-B-16, ViT-B-32, ViT-L-14, ViT-L-14-336."""
    pretrained: str = ""
    """Weights of --model; a shape needs none."""
    keep: tuple[float, ...] = (0.6,)
    """Shares of patches of the one-cut graphs; four cuts are measured at the same MACs."""
    layer: int | None = None
    """Blocks that run before the cut; without it a quarter of the depth."""
    variants: tuple[str, ...] = VARIANTS
    """Graphs beside the dense one: drop-1, fold-1 (one cut), fold-4 (four cuts), accurate (the preset)."""
    batch: tuple[int, ...] = (1, 16)
    """Images per call."""
    precision: tuple[str, ...] = ("float32",)
    """Precisions: float32, float16, int8. Speed-ups are over the dense graph in the first, in the first runtime."""
    runtime: tuple[str, ...] = ("onnxruntime",)
    """Runtimes: onnxruntime, openvino."""
    rounds: int = 7
    """Timed calls of every graph; one more is made first and thrown away."""
    threads: int = 1
    """Threads of the runtime."""
    opset: int = 18
    """ONNX operator set: 18 or 23."""
    pick_ms: float | None = None
    """Also choose one cut (layer, and a count that makes the tokens a multiple of 8) whose measured latency at the
    first --batch is at most this many milliseconds."""
    graphs: Path = Path("out/bench-graphs")
    """Folder of the graphs; what is there already is not written again."""
    prepare_only: bool = False
    """Write the graphs and stop."""
    seed: int = 0
    """Seed of images, scores and random weights."""
    out: Path = Path("out/bench")
    """Folder of export_bench.json and of what was measured so far; rows of several models gather in it."""


def check(config: BenchConfig) -> None:
    """Check all that needs no model. Raises: UserError."""
    for name in ("rounds", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be 1 or more")
    for name, known in (("precision", PRECISIONS[:3]), ("variants", VARIANTS), ("opset", OPSETS)):
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value not in known:
                raise UserError(f"--{name} {value}: unknown; choose one of {', '.join(map(str, known))}")
    if not config.batch or min(config.batch) < 1:
        raise UserError(f"--batch {' '.join(map(str, config.batch))}: needs sizes of 1 or more")
    for keep in config.keep:
        if not 0.0 < keep < 1.0:
            raise UserError(f"--keep {keep:g}: must lie in (0, 1) here; the dense graph is measured anyway")
    if config.pick_ms is not None and config.pick_ms <= 0:
        raise UserError(f"--pick-ms {config.pick_ms:g}: must be above 0; it is a latency in milliseconds")
    check_runtimes(config.runtime)
