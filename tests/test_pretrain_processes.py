"""Two processes with half a batch each have the loss and the gradients of one process with the whole batch."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from patchrank.pretrain.losses.gathering import gather_rows
from patchrank.pretrain.losses.simclr import nt_xent
from patchrank.pretrain.objectives import OBJECTIVES, Encoded, Widths, caption_ids

CAPTIONS = [("a two", "a red two"), ("a two",), ("a six", "a red six", "red"), ("a two", "a blue two")]
DRAWN = ["a two", "a two", "a red six", "a blue two"]


class Toy(nn.Module):
    """Two linear towers, a scale and every term that gathers."""

    def __init__(self, gather_grad: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 5), nn.Linear(6, 5)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.clip = OBJECTIVES["clip"](gather_grad=gather_grad)
        self.siglip = OBJECTIVES["siglip"](gather_grad=gather_grad)

    def forward(self, x_BC, y_BC, caption_BM, drawn_B):
        feature_VBD = torch.stack([self.image(x_BC), self.image(x_BC.roll(1, -1))])
        given = dict(feature_VBD=feature_VBD, text_BD=self.text(y_BC), scale=self.log_scale.exp())
        plain, several = Encoded(**given), Encoded(**given, caption_BM=caption_BM, drawn_B=drawn_B)
        losses = [self.clip(plain), self.clip(several), self.siglip(several), nt_xent(*feature_VBD)]
        return torch.stack(losses).sum()


def batch(rows: slice):
    x_BC, y_BC = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    return x_BC[rows], y_BC[rows], *caption_ids(CAPTIONS[rows], DRAWN[rows])


def text_gradient_of_siglip() -> torch.Tensor:
    """With constants gathered, this process's own texts must still be trained."""
    model, (x_BC, y_BC, caption_BM, drawn_B) = Toy(False), batch(slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
    given = dict(feature_VBD=model.image(x_BC)[None], text_BD=model.text(y_BC), scale=model.log_scale.exp())
    model.siglip(Encoded(**given, caption_BM=caption_BM, drawn_B=drawn_B)).backward()
    return model.text.weight.grad


def patch_tokens() -> torch.Tensor:
    return torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(2))


def centre(x_BNC: torch.Tensor) -> torch.Tensor:
    """Where the distillation's centre is after the teacher saw these patch tokens."""
    widths = Widths(image=8, image_heads=2, num_patches=4, text=8, text_heads=2)
    distill = OBJECTIVES["distill"](widths, num_codes=8)
    teacher = SimpleNamespace(patch_BNC=x_BNC)
    distill.targets(SimpleNamespace(teacher_heads={"distill": nn.Identity()}, teacher=teacher))
    return distill.centre_Q


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for gather_grad in (True, False):
        model = Toy(gather_grad)
        loss = model(*batch(slice(2 * rank, 2 * rank + 2)))
        loss.backward()
        for parameter in model.parameters():  # what DistributedDataParallel does
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        mean = gather_rows(loss.detach()[None]).mean()
        torch.save((mean, gradients(model)), os.path.join(folder, f"{gather_grad}-{rank}.pt"))
    rows = slice(2 * rank, 2 * rank + 2)
    torch.save((text_gradient_of_siglip(), centre(patch_tokens()[rows])), os.path.join(folder, f"terms-{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.system
def test_two_processes_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, args=(folder,), nprocs=2, start_method="spawn")
        found = {path.stem: torch.load(path, weights_only=True) for path in Path(folder).glob("*.pt")}
    for rank in (0, 1):
        siglip, mean_Q = found[f"terms-{rank}"]
        assert siglip is not None and siglip.abs().sum() > 0
        torch.testing.assert_close(mean_Q, centre(patch_tokens()))
    whole = Toy(True)
    loss = whole(*batch(slice(0, 4)))
    loss.backward()
    expected = gradients(whole)
    for rank in (0, 1):
        mean, grads = found[f"True-{rank}"]
        torch.testing.assert_close(mean, loss.detach())
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        mean, grads = found[f"False-{rank}"]
        torch.testing.assert_close(mean, loss.detach())
        assert not torch.allclose(grads["image.weight"], expected["image.weight"], rtol=1e-3)
        for name in ("log_scale", "siglip.bias"):
            torch.testing.assert_close(grads[name], expected[name])
