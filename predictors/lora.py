"""Low-rank corrections of a frozen tower's linear maps, trained beside them and then added to their weights.

Letters: O outputs, I inputs, R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from patchrank.pretrain.draws import generator


class LowRank(nn.Module):
    """weight (O, I) -> weight + up (O, R) @ down (R, I) / sqrt(R); at first the weight itself, since `up` is zero.

    Source: LoRA (Hu et al. 2022, section 4.1), scaled as in rsLoRA (Kalajdzievski 2023, equation 3) with alpha = 1, so
    that one learning rate serves all ranks; down starts with variance 1 / I.
    """

    def __init__(self, weight_OI: Tensor, rank: int, start: torch.Generator) -> None:
        super().__init__()
        num_outputs, num_inputs = weight_OI.shape
        down_RI = torch.randn(rank, num_inputs, generator=start) / num_inputs**0.5
        self.down_RI = nn.Parameter(down_RI.to(weight_OI))
        self.up_OR = nn.Parameter(weight_OI.new_zeros(num_outputs, rank))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The corrected weight."""
        return weight_OI + self.up_OR @ self.down_RI / len(self.down_RI) ** 0.5


def attach(modules: Iterator[tuple[str, nn.Module]], rank: int, seed: int = 0) -> dict[str, nn.Parameter]:
    """Give each linear map among the named modules a `LowRank` of its own; returns their parameters by name.

    Args: rank >= 0; 0 attaches nothing.
    """
    found: dict[str, nn.Parameter] = {}
    if rank == 0:
        return found
    linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    for number, (name, module) in enumerate(linears):
        correction = LowRank(module.weight, rank, generator(seed, "lora", number))
        parametrize.register_parametrization(module, "weight", correction)
        found |= {f"{name}.{key}": value for key, value in correction.named_parameters()}
    return found


def absorb(module: nn.Module) -> None:
    """Add every correction within a module to its weight; its state then has the names and shapes of before."""
    for part in list(module.modules()):
        if isinstance(part, nn.Linear) and parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
