"""A module with tensors in and out -> one clean ONNX graph: dynamic batch, weights as initialisers, nothing spare.

The exporter's graph is right but not tidy; the passes in `export.tidy` take out what costs time without doing work.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import Tensor, nn

from export.operators import check_operators
from export.tidy import tidy
from patchrank.errors import UserError

OPSETS = (18, 23)
MAX_BATCH = 1024
MAX_LENGTH = 4096


def _stable_sort(values, stable: bool = False, dim: int = -1, descending: bool = False):
    """ONNX's TopK breaks ties by the lower index (its specification says so), which is what a stable sort does."""
    from onnxscript import opset18 as op

    width = op.Constant(value_ints=[int(values.shape[dim])])
    return op.TopK(values, width, axis=dim, largest=int(descending), sorted=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)


def trace(
    module: nn.Module,
    example: Tensor,
    input_name: str,
    output_names: list[str],
    opset: int,
    *,
    free_length: bool = False,
) -> onnx.ModelProto:
    """`module` as an ONNX graph in float32, its first axis free from 1 to MAX_BATCH.

    Args: example (B >= 2, ...), the one input; free_length frees the second axis too (a lone block, for timing).
    Raises: UserError for operators outside the positive list.
    """
    free = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    if free_length:
        free[1] = torch.export.Dim("length", min=2, max=MAX_LENGTH)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(free,),
            input_names=[input_name],
            output_names=output_names,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
    model = tidy(program.model_proto)
    if not model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_param"):
        raise UserError(f"batch of {len(example)}: something in the module fixes it; take sizes from .shape, not len()")
    check_operators(model)
    onnx.checker.check_model(model)
    return model
