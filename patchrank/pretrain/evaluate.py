"""Zero-shot accuracy of the pair in training, with the same class matrix that users get. Letters: B, D, Y classes."""

from copy import deepcopy

import torch
import torch.nn.functional as F

from patchrank.checkpoints.loaded import LoadedClip
from patchrank.loading import class_matrix
from patchrank.preprocess import Preprocess
from patchrank.pretrain.model import Pair
from patchrank.pretrain.pictures import Pictures, normalise
from patchrank.text_encoders import OwnText


@torch.no_grad()
def zero_shot_accuracy(pair: Pair, pictures: Pictures, preprocess: Preprocess, batch_size: int) -> float:
    """Share in [0, 1] of labelled pictures whose nearest class prompt is theirs; every patch is seen.

    Broken pictures do not count. NaN if no picture has a label.
    """
    tower, device = pair.tower, pair.log_scale.device
    clip = LoadedClip(
        tower=tower,
        preprocess=preprocess,
        model_name="in training",
        pretrained="",
        weights_hash="",
        text=OwnText(deepcopy(pair.text), pair.log_scale.exp().item()),
    )
    weight_DY = class_matrix(clip, pictures.dataset)[0].to(device)
    labels = [item.label for item in pictures.dataset.images]
    num_right = num_seen = 0
    for start in range(0, len(labels), batch_size):
        numbers = [
            number for number in range(start, min(start + batch_size, len(labels))) if labels[number] is not None
        ]
        image_BCHW, numbers = pictures.batch(numbers)
        if not numbers:
            continue
        feature_BD = F.normalize(tower(normalise(image_BCHW, preprocess).to(device)), dim=-1)
        label_B = torch.tensor([labels[number] for number in numbers], device=device)
        num_right += int(((feature_BD @ weight_DY).argmax(1) == label_B).sum())
        num_seen += len(numbers)
    return num_right / num_seen if num_seen else float("nan")
