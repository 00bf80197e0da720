"""Our ToMe beside the original repository's merging on the same tensors; the original is not part of this project.

Runs where `tome` (github.com/facebookresearch/ToMe, non-commercial licence) is importable, skips elsewhere.
"""

import pytest
import torch

from eval.rivals import tome

original = pytest.importorskip("tome.merge", reason="the original ToMe repository is not on the path")


@pytest.mark.parametrize("num_tokens", [5, 16, 17, 197])
@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_the_same_tokens_and_sizes(num_tokens: int, num_prefix: int, share: float) -> None:
    torch.manual_seed(num_tokens)
    r = max(1, int(share * ((num_tokens - num_prefix) // 2)))
    metric_BLM, x_BLC = torch.randn(3, num_tokens, 16), torch.randn(3, num_tokens, 24)
    size_BL = torch.randint(1, 9, (3, num_tokens)).float()
    theirs, _ = original.bipartite_soft_matching(metric_BLM, r, class_token=num_prefix == 1)
    expected_BLC, expected_BL1 = original.merge_wavg(theirs, x_BLC, size_BL.unsqueeze(-1))
    found_BLC, found_BL = tome.merge(x_BLC, size_BL, tome.match(metric_BLM, r, num_prefix), num_prefix)
    if num_prefix == 0:  # without a class token the original leaves the unmerged in order of similarity
        found_BLC, expected_BLC = _sorted(found_BLC), _sorted(expected_BLC)
        assert torch.equal(found_BL.sort(1).values, expected_BL1.squeeze(-1).sort(1).values)
    else:
        torch.testing.assert_close(found_BL, expected_BL1.squeeze(-1))
    torch.testing.assert_close(found_BLC, expected_BLC)


def _sorted(x_BLC: torch.Tensor) -> torch.Tensor:
    """Tokens in order of their first channel."""
    order_BL = x_BLC[..., 0].argsort(dim=1)
    return x_BLC.gather(1, order_BL.unsqueeze(-1).expand_as(x_BLC))
