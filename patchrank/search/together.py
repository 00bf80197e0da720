"""Who leaves together: patches whose losses, added up, do the least damage, because they cancel each other out.

Letters: S patches to choose from, n leaving, O others, T patches that could come back, D feature.
"""

import torch
from torch import Tensor

from patchrank.search.criteria import Damage

_MAX_SWAPS = 30
_GAIN = 1e-6
_LEAST_TRADE = 1e-4


def leave_together(feature_D: Tensor, change_SD: Tensor, damage: Damage, num: int, barred_SS: Tensor) -> list[int]:
    """Which patches leave together: greedy on the sum of their changes, then the best swaps while these help.

    Args: feature now; its change by each patch's loss alone; pairs (S, S) bool, symmetric, that never both leave.
    Returns: at most `num` indices, fewer where bars forbid more.
    """
    taken = one_by_one(feature_D, change_SD, damage, num, barred_SS)
    return improve(feature_D, change_SD, damage, taken, barred_SS)


def improve(feature_D: Tensor, change_SD: Tensor, damage: Damage, taken: list[int], barred_SS: Tensor) -> list[int]:
    """`taken` after the best swaps, one after the other while they help."""
    for _ in range(_MAX_SWAPS):
        better = best_swap(feature_D, change_SD, damage, taken, barred_SS)
        if better is None:
            return taken
        taken = better
    return taken


def in_turn(feature_D: Tensor, change_SD: Tensor, damage: Damage, taken: list[int]) -> list[int]:
    """The same patches in the order in which they would leave one by one."""
    free_nn = torch.zeros(len(taken), len(taken), dtype=torch.bool, device=change_SD.device)
    order = one_by_one(feature_D, change_SD[taken], damage, len(taken), free_nn)
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


def trades(
    feature_D: Tensor, leave_SD: Tensor, join_TD: Tensor, damage: Damage, barred_SS: Tensor
) -> list[tuple[int, int]]:
    """Pairs (s, t): patch s leaves and patch t comes back; greedy, as long as the foreseen damage falls.

    Args: changes by each loss (S, D) and by each return (T, D) alone; pairs (S, S) bool that never both leave.
    """
    is_out_S = torch.zeros(len(leave_SD), dtype=torch.bool, device=leave_SD.device)
    is_back_T = torch.zeros(len(join_TD), dtype=torch.bool, device=leave_SD.device)
    least, pairs = damage(feature_D.unsqueeze(0))[0], []
    while not is_out_S.all() and not is_back_T.all():
        foreseen_STD = feature_D + leave_SD.unsqueeze(1) + join_TD
        damage_ST = damage(foreseen_STD.flatten(0, 1)).view(len(leave_SD), len(join_TD))
        damage_ST = damage_ST.masked_fill(is_out_S.unsqueeze(1) | is_back_T, torch.inf)
        s, t = divmod(int(damage_ST.argmin()), len(join_TD))
        if not damage_ST[s, t] < (1 - _LEAST_TRADE) * least:
            break
        least, feature_D = damage_ST[s, t], foreseen_STD[s, t]
        is_out_S = is_out_S | barred_SS[s]
        is_out_S[s] = is_back_T[t] = True
        pairs.append((s, t))
    return pairs
