"""Small MLPs behind a tower that only training has. Letters: B rows, C in, E out."""

from torch import nn


def mlp_head(width: int, hidden: int, out: int, *, num_hidden: int = 1, bias: bool = False) -> nn.Sequential:
    """(B, width) -> (B, out): `num_hidden` times linear, batch norm, ReLU, then linear; no last norm.

    Args: bias: of the last map; a norm behind the others takes theirs away.
    Source: A-CLIP's released heads: SimCLR 768-4096-4096-256 with biases, BYOL projector 768-4096-256 and predictor
    256-4096-256 without.
    Under several processes convert with `nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    layers: list[nn.Module] = []
    for _ in range(num_hidden):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, out, bias=bias))
