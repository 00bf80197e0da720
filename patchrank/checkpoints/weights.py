"""State dicts in, towers out: every key is taken once with the shape it must have, and nothing may be left over."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.tower import TowerConfig, VisionTower

_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
}


def unsupported(model: str, reason: str) -> UserError:
    """The error for a tower that patchrank knows but cannot run."""
    return UserError(f"{model}: this tower is not supported: {reason}; use a ViT of open_clip, timm or Hugging Face")


def activation_name(module: nn.Module, model: str) -> str:
    """Our name (`patchrank.linear.ACTIVATIONS`) of an activation module."""
    name = type(module).__name__
    if name == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if name not in _ACTIVATIONS:
        raise unsupported(model, f"its activation {name} is not one of GELU, tanh GELU and quick GELU")
    return _ACTIVATIONS[name]


def shared_norm_eps(module: nn.Module, model: str) -> float:
    """The epsilon that all LayerNorms of a module share."""
    values = {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}
    if len(values) != 1:
        raise unsupported(model, f"its LayerNorm epsilons differ or there are none: {sorted(values)}")
    return values.pop()


class Weights:
    """A state dict whose tensors are taken one by one; `close` refuses what nobody took."""

    def __init__(self, state: dict[str, Tensor], source: str) -> None:
        self._state = dict(state)
        self._source = source
        self._prefix = ""

    def under(self, prefix: str) -> "Weights":
        """The same tensors under shorter names; what is taken there is taken here."""
        view = Weights({}, self._source)
        view._state, view._prefix = self._state, self._prefix + prefix
        return view

    def shape(self, name: str) -> torch.Size | None:
        """Shape of a tensor that is still there; None without one."""
        tensor = self._state.get(self._prefix + name)
        return None if tensor is None else tensor.shape

    def take(self, name: str, *shape: int) -> Tensor:
        """Remove and return one tensor of exactly this shape."""
        name = self._prefix + name
        if name not in self._state:
            raise UserError(f"{self._source}: key {name!r} is missing; the checkpoint does not fit this architecture")
        tensor = self._state.pop(name)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self._source}: key {name!r} has shape {tuple(tensor.shape)}, must be {shape}; "
                "the checkpoint does not fit this architecture"
            )
        return tensor.detach()

    def take_linear(self, theirs: str, ours: str, num_out: int, num_in: int, bias: bool = True) -> dict[str, Tensor]:
        """Weight and bias of one affine map under our names."""
        state = {f"{ours}.weight": self.take(f"{theirs}.weight", num_out, num_in)}
        return state | ({f"{ours}.bias": self.take(f"{theirs}.bias", num_out)} if bias else {})

    def take_norm(self, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
        """Weight and bias of one LayerNorm under our names."""
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}", width) for part in ("weight", "bias")}

    def take_fused_qkv(self, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
        """`nn.MultiheadAttention`'s input projection under our names."""
        weight, bias = f"{theirs}.in_proj_weight", f"{theirs}.in_proj_bias"
        return {f"{ours}.weight": self.take(weight, 3 * width, width), f"{ours}.bias": self.take(bias, 3 * width)}

    def close(self) -> None:
        """Refuse keys that were not taken."""
        if self._state:
            names = sorted(self._state)
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise UserError(
                f"{self._source}: {len(names)} unknown keys: {shown}; every key of a checkpoint must have its place"
            )


def build_tower(config: TowerConfig, state: dict[str, Tensor], model: str) -> VisionTower:
    """Tower in eval mode with copies of `state`, in the dtype and on the device of its patch embedding."""
    with torch.device("meta"):
        tower = VisionTower(config)
    expected = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise unsupported(model, f"its shapes do not make a tower at: {', '.join(wrong[:8])}")
    like = state["patch.weight"]
    copies = {name: tensor.to(like, copy=True).contiguous() for name, tensor in state.items()}
    tower.load_state_dict(copies, assign=True)
    return tower.eval().requires_grad_(False)


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or PyTorch file; pickled code is never run.

    A training checkpoint's "state_dict" entry is unwrapped, and the "module." that distributed training puts before
    every name is removed. Raises: UserError for a file that is absent, broken, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a safetensors or PyTorch checkpoint")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), "pt") as file:
                metadata = dict(file.metadata() or {})
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a safetensors file or a PyTorch file of tensors only ({reason}); "
            "save the state dict, not the model or a TorchScript archive"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise UserError(f"{path}: must hold a non-empty dictionary of tensors; save model.state_dict()")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state, metadata


def weights_hash(tower: nn.Module) -> str:
    """Hex SHA-256 over (name, dtype, shape, bytes) of all tensors of a module, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
