"""ONNX graph -> TensorRT or TensorRT-RTX engine, strongly typed: precision comes from the graph alone.

TensorRT times kernels on the GPU that it builds for; TensorRT-RTX builds ahead of time for named architectures on a
host without one, and finishes the kernels where the engine is loaded.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from patchrank.atomic import write_bytes
from patchrank.errors import UserError

BACKENDS = ("tensorrt", "tensorrt-rtx")
_INSTALL = {"tensorrt": "pip install 'patchrank[trt]'", "tensorrt-rtx": "pip install 'patchrank[rtx]'"}


class MissingBackend(Exception):
    """No TensorRT that could build here; the message says what to install."""


class RefusedGraph(UserError):
    """The parser or the builder did not take a graph; the message holds its reasons."""


@dataclass(frozen=True)
class Backend:
    """An installed TensorRT."""

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        return self.module.__version__


@dataclass(frozen=True, kw_only=True)
class Build:
    """How an engine is built."""

    batch: tuple[int, int, int] = (1, 16, 64)
    """Smallest, best and largest batch."""
    architectures: tuple[str, ...] = ("sm86", "sm89", "sm120")
    """Of TensorRT-RTX; one engine serves them all."""
    timing_cache: Path | None = None
    """Of TensorRT: kernel timings that the next build reuses."""


def _import(name: str) -> Backend | None:
    try:
        return Backend(name, importlib.import_module(name.replace("-", "_")))
    except (ImportError, OSError, RuntimeError):  # OSError: its libraries are absent
        return None


def find_backend(name: str) -> Backend:
    """The backend of a name, or for "auto" what can build here: TensorRT where there is a GPU, else TensorRT-RTX.

    Raises: MissingBackend, with one line on what to install; UserError for an unknown name.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"--backend {name}: unknown; choose one of auto, {', '.join(BACKENDS)}")
    gpu = torch.cuda.is_available()
    if name == "tensorrt" and not gpu:
        raise MissingBackend(
            f"--backend tensorrt: there is no GPU here to build on; {_INSTALL['tensorrt-rtx']} builds without one"
        )
    names = [name] if name != "auto" else (["tensorrt", "tensorrt-rtx"] if gpu else ["tensorrt-rtx"])
    for candidate in names:
        found = _import(candidate)
        if found is not None:
            return found
    raise MissingBackend(f"{' and '.join(names)}: not installed; {_INSTALL[names[-1]]}")


def quiet_logger(trt: ModuleType):
    """A logger that keeps errors for the message and prints nothing."""

    class Quiet(trt.ILogger):
        """Keeps errors for the message; prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Quiet()


def _strongly_typed(trt: ModuleType) -> int:
    """The network flag; later versions know no other kind and may drop it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _reasons(parser) -> str:
    """Every reason of a parser that refused, with the node that it is about."""
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)


def build_engine(backend: Backend, graph: Path, build: Build) -> bytes:
    """Serialised engine of an ONNX file with one dynamic batch profile.

    Raises: RefusedGraph with the parser's reasons and node names; UserError for an unknown architecture.
    """
    trt = backend.module
    logger = quiet_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise RefusedGraph(f"{graph.name}: {backend.name} {backend.version} refuses it: {_reasons(parser)}")
    _decompose_attention(trt, network)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, build))
    flags = getattr(trt, "BuilderFlag", None)
    if hasattr(flags, "TF32"):
        config.clear_flag(flags.TF32)  # else a float32 graph would multiply with 10 bits of mantissa
    if backend.name == "tensorrt-rtx":
        _set_architectures(trt, config, build.architectures)
    else:
        _load_timings(config, build.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RefusedGraph(f"{graph.name}: {backend.name} builds no engine: {'; '.join(logger.errors) or 'no reason'}")
    if backend.name == "tensorrt" and build.timing_cache is not None:
        write_bytes(build.timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def _decompose_attention(trt: ModuleType, network) -> None:
    """Let Attention nodes fall back to products and softmax where no fused kernel takes their type (float32)."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the binding's own way down from ILayer
            layer.attention.decomposable = True


def _profile(builder, network, build: Build):
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        value = network.get_input(number)
        rest = tuple(value.shape)[1:]
        profile.set_shape(value.name, *((batch, *rest) for batch in build.batch))
    return profile


def _set_architectures(trt: ModuleType, config, names: tuple[str, ...]) -> None:
    known = sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    for name in names:
        if name.upper() not in known:
            raise UserError(f"--architectures {name}: TensorRT-RTX has {', '.join(known).lower()}; choose from these")
    config.num_compute_capabilities = len(names)
    for number, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), number)


def _load_timings(config, path: Path | None) -> None:
    if path is not None:
        data = path.read_bytes() if path.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(data), ignore_mismatch=False)
