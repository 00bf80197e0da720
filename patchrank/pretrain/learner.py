"""Everything of a recipe that has weights: towers, heads, teacher; one part of a batch in, named losses out.

Letters: V views, B pictures, U distinct texts, D feature, T width before the projection, L text tokens.
"""

import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.pretrain.batches import Batch
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.ema import momentum_at
from patchrank.pretrain.maskers import MASKERS, MaskContext, encode_masked, mask
from patchrank.pretrain.model import Pair
from patchrank.pretrain.objectives import Encoded, Objectives, Widths, caption_ids, contrastive_loss
from patchrank.pretrain.recipes import Recipe, View
from patchrank.pretrain.teacher import Teacher, TeacherView
from patchrank.text import END, PAD, START, TextTower

_OWN_PASSES = {"tower", "text tower"}
"""What an objective needs that runs blocks itself: it computes in the precision of the towers."""


def _terms(recipe: Recipe, config: PretrainConfig) -> dict[str, tuple[float, dict]]:
    """What `Objectives` is built from: weights, and options that follow from the recipe and the head sizes."""
    text_views = tuple(number for number, view in enumerate(recipe.views) if view.meets_text)
    other_views = tuple(number for number, view in enumerate(recipe.views) if view.meets_views)
    heads = dict(hidden=config.head_width, out=config.head_out, views=other_views)
    contrast = dict(views=text_views, gather_grad=recipe.gather_grad)
    known = dict(clip=contrast, siglip=contrast, simclr=heads, byol=heads, distill=dict(num_codes=config.head_width))
    return {name: (weight, known.get(name, {})) for name, weight in recipe.terms.items()}


def drop_tokens(token_BL: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, L) int64 with PAD, which nothing attends to, in place of a `share` in [0, 1) of them.

    Start and end stay. Source: word dropout (Iyyer et al. 2015, section 4), by the token.
    """
    dropped_BL = torch.rand(token_BL.shape, generator=generator, device=generator.device).to(token_BL.device) < share
    return token_BL.masked_fill(dropped_BL & (token_BL != START) & (token_BL != END), PAD)


def by_length(text: TextTower, token_BL: Tensor, chunk: int = 128) -> Tensor:
    """`text(token_BL)` (B, D), computed in chunks of similar length, each without its common padding: half the work.

    Where the image tower is not trained, the text tower is all the work there is.
    """
    length_B = (token_BL == END).int().argmax(1) + 1
    order_B = length_B.argsort(stable=True)
    found = [text(token_BL[rows, : int(length_B[rows[-1]])]) for rows in order_B.split(chunk)]
    return torch.cat(found)[order_B.argsort()]


class Learner(nn.Module):
    """Towers, objectives and teacher of one recipe.

    Args: alone: whether this process is the only one; equal texts are then encoded and compared once.
    """

    def __init__(self, pair: Pair, config: PretrainConfig, seed: int, alone: bool = True) -> None:
        super().__init__()
        recipe = config.row
        self.config, self.recipe, self.alone = config, recipe, alone
        self.pair = pair
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.objectives = Objectives(_terms(recipe, config), Widths.of(pair.tower, pair.text))
        asked = frozenset().union(*(MASKERS[view.mask.masker].needs for view in recipe.views))
        self.needs = self.objectives.needs | asked
        self.teacher = None
        if recipe.teacher is not None:
            text = pair.text if "text" in self.needs else None
            self.teacher = Teacher(pair.tower, self.objectives.followed, text)
        self.teacher_seconds = 0.0
        """Wall time of the teacher since somebody set it to zero."""

    def _autocast(self):
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.config.device, dtype=torch.bfloat16)

    def forward(
        self, batch: Batch, views: tuple[View, ...], progress: float, chance: torch.Generator
    ) -> dict[str, Tensor]:
        """Terms of a part of a batch by name, their weighted sum as "loss", "hits" and "kept".

        Hits: share of pictures whose nearest text is true for them; kept: share of the patches that the views keep.
        Args: a batch on the CPU; the views' masks at this step; progress of the run in [0, 1]; chance of the masks.
        """
        device = self.pair.log_scale.device
        token_UL = self.pair.text.tokenize(batch.texts)
        token_UL = token_UL[:, : int((token_UL != PAD).sum(1).max())].to(device)
        if self.config.word_drop:
            token_UL = drop_tokens(token_UL, self.config.word_drop, chance)
        text_B = batch.text_B.to(device)
        with self._autocast():
            text_UD = by_length(self.pair.text, token_UL) if self.recipe.locked else self.pair.text(token_UL)
            seen = self._look(batch, views, device)
            feature_VBD, pooled_VBT, kept = self._encode(batch, views, seen, token_UL[text_B], progress, chance)
        text_UD = text_UD.float()
        encoded = Encoded(
            feature_VBD=feature_VBD.float(),
            text_BD=text_UD[text_B],
            scale=self.pair.log_scale.exp(),
            pooled_VBT=None if pooled_VBT is None else pooled_VBT.float(),
            teacher=seen,
            teacher_heads=None if self.teacher is None else self.teacher.heads,
            tower=self.pair.tower,
            image_BCHW=None if batch.feature_BD is not None else batch.image_BCHW.to(device),
            text_tower=self.pair.text,
            token_BL=token_UL[text_B],
            generator=chance,
            **self._ids(batch, device),
        )
        return self._losses(encoded, text_UD, batch) | ({} if kept is None else {"kept": kept})

    def _ids(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Which captions are true for which pictures, as processes tell each other."""
        if self.alone and "siglip" not in self.objectives.weights:
            return {}
        drawn = [batch.texts[number] for number in batch.text_B.tolist()]
        caption_BM, drawn_B = caption_ids(batch.captions, drawn)
        return dict(caption_BM=caption_BM.to(device), drawn_B=drawn_B.to(device))

    def _look(self, batch: Batch, views: tuple[View, ...], device: torch.device) -> TeacherView | None:
        masked = any(view.mask.keep < 1.0 and "teacher" in MASKERS[view.mask.masker].needs for view in views)
        if self.teacher is None or not (masked or "teacher" in self.objectives.needs):
            return None
        started = time.perf_counter()
        box_B4 = None if batch.teacher_box_B4 is None else batch.teacher_box_B4.to(device)
        patches = "teacher patches" in self.needs
        seen = self.teacher.look(batch.teacher_BCHW.to(device), patches=patches, box_B4=box_B4)
        self.teacher_seconds += time.perf_counter() - started
        return seen

    def _encode(
        self, batch: Batch, views: tuple[View, ...], seen: TeacherView | None, token_BL: Tensor, progress: float,
        chance: torch.Generator,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Features (V, B, D), the same before the projection (V, B, T), and the share of patches that views keep."""
        tower, device = self.pair.tower, token_BL.device
        if self.recipe.locked:
            with torch.no_grad():
                known = batch.feature_BD
                return (tower(batch.image_BCHW.to(device)) if known is None else known.to(device))[None], None, None
        pooled, kept = [], []
        for number, view in enumerate(views):
            image_BCHW = batch.view_VBCHW[number].to(device)
            x_BLC = tower.embed(image_BCHW)
            needs = MASKERS[view.mask.masker].needs
            context = MaskContext(
                image_BCHW=image_BCHW,
                patch_size=tower.config.patch_size,
                generator=chance,
                progress=progress,
                pixel_std=self.config.preprocess().std,
                token_BNC=x_BLC[:, tower.config.num_prefix :].detach() if "tokens" in needs else None,
                teacher=seen,
                box_B4=None if batch.box_VB4 is None else batch.box_VB4[number].to(device),
                text_BD=self.teacher.text(token_BL) if "text" in needs else None,
                block=view.mask.block,
            )
            selection = mask(view.mask, context)
            pooled.append(encode_masked(tower, x_BLC, selection, view.mask.rest))
            kept.append(torch.ones((), device=device) if selection is None else selection.share(context.num_patches))
        pooled_VBT = torch.stack(pooled)
        return tower.proj(pooled_VBT), pooled_VBT, torch.stack(kept).mean()

    def _losses(self, encoded: Encoded, text_UD: Tensor, batch: Batch) -> dict[str, Tensor]:
        device = text_UD.device
        positive_BU, text_UD = batch.positive_BU.to(device), F.normalize(text_UD, dim=-1)
        image_VBD = F.normalize(encoded.feature_VBD, dim=-1)
        text_views = [number for number, view in enumerate(self.recipe.views) if view.meets_text]
        found = {}
        for name, term in self.objectives.terms.items():
            if name == "clip" and self.alone:
                count_U = batch.count_U.to(device)
                each = [
                    contrastive_loss(image_VBD[view], text_UD, positive_BU, count_U, encoded.scale)
                    for view in text_views
                ]
                found[name] = each[0] if len(each) == 1 else torch.stack(each).mean()
            else:
                with self._autocast() if term.needs & _OWN_PASSES else nullcontext():
                    found[name] = term(encoded)
        found = self.objectives.with_total(found)
        with torch.no_grad():
            nearest_B1 = (image_VBD[text_views[0]] @ text_UD.T).argmax(1, keepdim=True)
            found["hits"] = positive_BU.gather(1, nearest_B1).float().mean()
        return found

    def follow(self, step: int) -> None:
        """Move the teacher; once after optimiser step `step`."""
        if self.teacher is None:
            return
        started = time.perf_counter()
        momentum = momentum_at(step, self.config.num_steps, self.recipe.teacher.base)
        self.teacher.update(momentum, self.pair.tower, self.objectives.followed, self.pair.text)
        self.teacher_seconds += time.perf_counter() - started
