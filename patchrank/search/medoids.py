"""A good start that needs no evaluation: keep the patches that stand in best for all others, as k-medoids does.

Letters: N patches, A patches still alive, M metric channels.
"""

import torch
from torch import Tensor


def medoid_order(metric_NM: Tensor, weight_N: Tensor) -> Tensor:
    """Backward elimination (N,) int64, most important first: take away the patch whose guests move least.

    The cost of a kept set is the sum over all patches of weight (N,) >= 0 times the squared distance to the nearest
    kept patch in `metric_NM`. Each round looks at the nearest and second nearest kept patch of everyone: O(N^2).
    Source: ours; the greedy reverse of k-medoids (Kaufman & Rousseeuw 1987), weighted by sensitivity.
    """
    num_patches = len(weight_N)
    cost_NN = torch.cdist(metric_NM.double(), metric_NM.double()).square() * weight_N.double().unsqueeze(1)
    cost_NN.fill_diagonal_(0.0)
    alive_A = torch.arange(num_patches, device=metric_NM.device)
    removed = []
    while len(alive_A) > 1:
        two = torch.topk(cost_NN[:, alive_A], 2, dim=1, largest=False)
        increase_A = torch.zeros(len(alive_A), dtype=torch.float64, device=metric_NM.device)
        increase_A.index_add_(0, two.indices[:, 0], two.values[:, 1] - two.values[:, 0])
        least = increase_A.argmin()
        removed.append(int(alive_A[least]))
        alive_A = torch.cat([alive_A[:least], alive_A[least + 1 :]])
    return torch.tensor([*alive_A.tolist(), *removed[::-1]], device=metric_NM.device)
