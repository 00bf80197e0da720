"""What every export command can be told: the only home of these defaults, help texts and rules."""

from dataclasses import asdict, dataclass
from pathlib import Path

from export.precision import PRECISIONS
from export.runtimes import check_runtimes
from export.tracing import OPSETS
from patchrank.errors import UserError

TOWERS = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a CLIP tower as ONNX graphs that were compared with PyTorch."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    pruned: Path | None = None
    """Folder of a saved pruned tower: its weights, scorer and cuts (--keep, --macs or --cuts replace the cuts); --model
    still says what its pictures and texts are."""
    tower: str = "image"
    """"image" (pruned) or "text" (as it is, so that a deployed CLIP answers any class list)."""
    keep: tuple[float, ...] = ()
    """One model per share of patches that one cut leaves; 1 is the dense tower."""
    macs: tuple[float, ...] = ()
    """One model per share of the dense image tower's MACs (preset `accurate`). If nothing else says how much is pruned:
    0.7."""
    cuts: str = ""
    """One model with these cuts: layer:count or layer:ratio, as 3:156,5:136."""
    layer: int | None = None
    """Blocks that run before the cut of --keep; without it a quarter of the depth."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop" (the papers)."""
    scorer: str | None = None
    """"salient": selection and merging weighed by the class token's attention, or a row of the scorer table, whose
    scores are priorities of a covering selection. Without it as `patchrank.apply` does: "salient" where the tower has
    a class token, else "random"."""
    seed: int = 0
    """Seed of scorers that draw."""
    data: str = "digits"
    """Data set of the comparison's images, and of the class list."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    split: str | None = None
    """Split of --data; without it "val" ("all" for --data folder)."""
    images: int = 48
    """Images of the comparison, spread over the classes."""
    classes: str = "data"
    """Class list inside the graph: "data" (that of --data), "none", or a text file with one name per line."""
    template: str = "a photo of a {}."
    """Prompt around the names of a --classes file."""
    source: tuple[int, int] | None = None
    """Rows and columns of the pictures, if the graph is to resize them itself (as Pillow does); without it they come at
    the model's size."""
    opset: int = 18
    """ONNX operator set: 18, or 23 (one Attention node per block)."""
    precision: tuple[str, ...] = ("float32",)
    """Precisions: float32, float16, int8 (dynamic), int8-static (scales fixed in the graph)."""
    calibration: int = 64
    """Images that int8 is measured on, product by product: of the "train" split where the data set has one."""
    runtime: tuple[str, ...] = ("onnxruntime",)
    """Runtimes of the comparison: onnxruntime, openvino."""
    out: Path = Path("out/onnx")
    """Folder of the graphs, their weights and the manifest."""

    def __post_init__(self) -> None:
        if self.split is None:
            object.__setattr__(self, "split", "all" if self.data == "folder" else "val")

    def to_dict(self) -> dict:
        """JSON-able form; folders and files of this machine are reduced to their last part."""
        return {name: _without_folders(value) for name, value in asdict(self).items()}


def _without_folders(value: object) -> object:
    local = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
    return Path(value).name if local else value


def check(config: ExportConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    for name, value, known in (("tower", config.tower, TOWERS), ("opset", config.opset, OPSETS)):
        if value not in known:
            raise UserError(f"--{name} {value}: must be one of {', '.join(map(str, known))}")
    for precision in config.precision:
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: unknown; choose one of {', '.join(PRECISIONS)}")
    if not config.precision:
        raise UserError(f"--precision: names none; choose from {', '.join(PRECISIONS)}")
    if config.images < 1:
        raise UserError(f"--images {config.images}: must be 1 or more; nothing is published without a comparison")
    if config.calibration < 1:
        raise UserError(f"--calibration {config.calibration}: must be 1 or more")
    check_runtimes(config.runtime)
    given = [name for name in ("keep", "macs", "cuts") if getattr(config, name)]
    if len(given) > 1:
        raise UserError(f"--{' and --'.join(given)}: exactly one of them decides how much is pruned; leave one out")
    if config.layer is not None and not config.keep:
        raise UserError(f"--layer {config.layer}: goes with --keep only; the others bring their own layers")
    if config.source is not None and (config.tower == "text" or min(config.source) < 1):
        raise UserError(f"--source {config.source}: needs the image tower, and 1 or more rows and columns")
    if config.tower == "text" and given:
        raise UserError(f"--{given[0]}: the text tower is not pruned; leave it out with --tower text")
    for name in ("keep", "macs"):
        if len(set(getattr(config, name))) != len(getattr(config, name)):
            raise UserError(f"--{name} {getattr(config, name)}: names a value twice; each gives one model")
