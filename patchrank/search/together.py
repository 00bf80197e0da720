"""Who leaves together: patches whose losses, added up, do the least damage, because they cancel each other out.

Letters: S patches to choose from, n leaving, O others, D feature.
"""

import torch
from torch import Tensor

from patchrank.search.criteria import Damage

_MAX_SWAPS = 30
_GAIN = 1e-6


def leave_together(feature_D: Tensor, change_SD: Tensor, damage: Damage, num: int, barred_SS: Tensor) -> list[int]:
    """Which patches leave together: greedy on the sum of their changes, then the best swaps while these help.

    Args: feature now; its change by each patch's loss alone; pairs (S, S) bool, symmetric, that never both leave.
    Returns: at most `num` indices (fewer where bars forbid more), in the order in which they would leave one by one.
    """
    taken = one_by_one(feature_D, change_SD, damage, num, barred_SS)
    for _ in range(_MAX_SWAPS):
        better = best_swap(feature_D, change_SD, damage, taken, barred_SS)
        if better is None:
            break
        taken = better
    order = one_by_one(feature_D, change_SD[taken], damage, len(taken), barred_SS[taken][:, taken])
    return [taken[place] for place in order]


def one_by_one(feature_D: Tensor, change_SD: Tensor, damage: Damage, num: int, barred_SS: Tensor) -> list[int]:
    """Greedy: always the patch after whose loss the foreseen damage is least; ties fall to the lowest index."""
    taken: list[int] = []
    is_out_S = torch.zeros(len(change_SD), dtype=torch.bool, device=change_SD.device)
    while len(taken) < num and not is_out_S.all():
        index = int(damage(feature_D + change_SD).masked_fill(is_out_S, torch.inf).argmin())
        feature_D = feature_D + change_SD[index]
        taken.append(index)
        is_out_S = is_out_S | barred_SS[index]
        is_out_S[index] = True
    return taken


def best_swap(
    feature_D: Tensor, change_SD: Tensor, damage: Damage, taken: list[int], barred_SS: Tensor
) -> list[int] | None:
    """`taken` with one patch exchanged for one of the others, if the foreseen damage falls clearly; else None."""
    is_other_S = torch.ones(len(change_SD), dtype=torch.bool, device=change_SD.device)
    is_other_S[taken] = False
    other_O = is_other_S.nonzero().squeeze(1)
    if len(other_O) == 0 or not taken:
        return None
    feature_D = feature_D + change_SD[taken].sum(0)
    swapped_nOD = feature_D - change_SD[taken].unsqueeze(1) + change_SD[other_O]
    damage_nO = damage(swapped_nOD.flatten(0, 1)).view(len(taken), len(other_O))
    clash_nO = barred_SS[taken][:, other_O].long()
    damage_nO = damage_nO.masked_fill(clash_nO.sum(0) > clash_nO, torch.inf)
    place, other = divmod(int(damage_nO.argmin()), len(other_O))
    if not damage_nO[place, other] < (1 - _GAIN) * damage(feature_D.unsqueeze(0))[0]:
        return None
    return [*taken[:place], int(other_O[other]), *taken[place + 1 :]]
