"""A TensorRT engine on this machine's GPU as a `Runner`: it goes through the same gate as every other runtime."""

import numpy as np
import torch
from torch import Tensor

from export.engine import Backend, quiet_logger
from export.runtimes import Runner


def open_engine(backend: Backend, engine: bytes, device: str = "cuda") -> Runner:
    """The engine, ready to run: inputs are copied to the device, outputs back.

    Raises: RuntimeError where the engine was built for another GPU or version.
    """
    trt = backend.module
    logger = quiet_logger(trt)
    runtime = trt.Runtime(logger)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise RuntimeError(f"this {backend.name} {backend.version} cannot load the engine: {'; '.join(logger.errors)}")
    context = loaded.create_execution_context()
    names = [loaded.get_tensor_name(number) for number in range(loaded.num_io_tensors)]
    inputs = [name for name in names if loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = tuple(name for name in names if name not in inputs)

    def run(image: np.ndarray, wanted: tuple[str, ...]) -> list[np.ndarray]:
        (name,) = inputs
        given = torch.from_numpy(np.ascontiguousarray(image)).to(device)
        context.set_input_shape(name, tuple(given.shape))
        context.set_tensor_address(name, given.data_ptr())
        found: dict[str, Tensor] = {}
        for output in outputs:
            kind = torch.from_numpy(np.empty(0, dtype=trt.nptype(loaded.get_tensor_dtype(output)))).dtype
            found[output] = torch.empty(tuple(context.get_tensor_shape(output)), dtype=kind, device=device)
            context.set_tensor_address(output, found[output].data_ptr())
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"the engine did not run: {'; '.join(logger.errors) or 'no reason given'}")
        return [found[output].cpu().numpy() for output in wanted]

    # The engine and its runtime must outlive the context.
    run.keep = (runtime, loaded)
    return Runner(backend.name, outputs, run)
