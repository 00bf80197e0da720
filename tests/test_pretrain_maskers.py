"""Every masker of the table, the selection behind it, and what the tower makes of a selection."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from patchrank.errors import UserError
from patchrank.pretrain.maskers import MASKERS, MaskContext, MaskSpec, Selection, encode, encode_masked, mask
from patchrank.pretrain.masking.attentive import AttentiveMasker
from patchrank.pretrain.masking.keep_set import expand_blocks, pool_blocks, search_threshold, select, select_bounded
from patchrank.pretrain.teacher import Teacher, TeacherView

GRID = (4, 4)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def student():
    return make_tower(seed=1)


@pytest.fixture(scope="module")
def teacher(student):
    return Teacher(student)


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(4, 3, 32, 32, generator=chance(7))


def full_context(student, teacher, image_BCHW, seed=0, **changes):
    """A context in which every masker finds what it needs."""
    text_BD = torch.stack([image.flatten()[:24] for image in image_BCHW])
    return MaskContext(
        **dict(
            image_BCHW=image_BCHW,
            patch_size=8,
            generator=chance(seed),
            progress=0.5,
            token_BNC=student.embed(image_BCHW)[:, 1:],
            teacher=teacher.look(image_BCHW, patches=True),
            text_BD=text_BD,
        )
        | changes
    )


def stub_view(score_BN, grid, box_B4=None):
    """A teacher view whose mean attention is `score_BN`."""
    B = len(score_BN)
    return TeacherView(
        grid=grid,
        attention_BSN=score_BN[:, None],
        pooled_BC=torch.zeros(B, 1),
        feature_BD=torch.zeros(B, 1),
        box_B4=box_B4,
    )


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", sorted(MASKERS))
def test_every_masker_keeps_k_distinct_ascending_patches(name, block, student, teacher, pictures):
    context = full_context(student, teacher, pictures, block=block)
    score_BX = MASKERS[name](replace(context, generator=chance(0)))
    assert score_BX.dtype == torch.float32 and score_BX.isfinite().all() and not score_BX.requires_grad
    assert score_BX.shape[1] in (16, 16 // block**2)
    for keep in (1 / 16, 0.5, 15 / 16):
        spec = MaskSpec(masker=name, keep=keep, block=block)
        keep_BK = mask(spec, context).keep_BK
        assert keep_BK.dtype == torch.int64 and keep_BK.shape == (4, spec.num_kept(GRID))
        assert (keep_BK.diff(dim=1) > 0).all() and keep_BK.min() >= 0 and keep_BK.max() < 16


@pytest.mark.parametrize("name", sorted(MASKERS))
def test_same_seed_same_patches_and_global_chance_untouched(name, student, teacher, pictures):
    spec = MaskSpec(masker=name, keep=0.5)
    before = torch.get_rng_state()
    contexts = [full_context(student, teacher, pictures, seed) for seed in (0, 0)]
    first, second = (mask(spec, context).keep_BK for context in contexts)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)
    others = [mask(spec, full_context(student, teacher, pictures, seed)).keep_BK for seed in range(1, 8)]
    by_chance = any(not torch.equal(first, other) for other in others)
    assert by_chance == (name not in ("attentive", "attentive-high", "text"))


@pytest.mark.parametrize("name", sorted(MASKERS))
def test_a_picture_s_patches_do_not_depend_on_its_neighbours(name, student, teacher, pictures):
    for spec in (MaskSpec(masker=name, keep=0.5), MaskSpec(masker=name, keep=0.75, least=0.25, threshold=-0.3)):
        together = mask(spec, full_context(student, teacher, pictures))
        alone = mask(spec, full_context(student, teacher, pictures[:1]))
        others = mask(spec, full_context(student, teacher, torch.cat([pictures[:1], 3 - pictures[1:]])))
        for found in (alone, others):
            assert torch.equal(found.keep_BK[0], together.keep_BK[0])
            if spec.least is not None:
                assert torch.equal(found.valid_BK[0], together.valid_BK[0])


@pytest.mark.parametrize("name", ["random", "cluster", "pgs", "pgs-no-transport"])
def test_chance_between_equal_scores_belongs_to_the_picture(name):
    flat_BCHW = torch.zeros(50, 3, 32, 32)
    context = lambda num: MaskContext(image_BCHW=flat_BCHW[:num], patch_size=8, generator=chance())  # noqa: E731
    many, one = (mask(MaskSpec(masker=name, keep=0.5), context(num)).keep_BK for num in (50, 1))
    assert torch.equal(many[:1], one) and len(many.unique(dim=0)) > 40


class Calls(TorchFunctionMode):
    """Records the name of every function and method of torch that is called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(MASKERS))
def test_no_masker_waits_for_the_device(name, student, teacher, pictures):
    """Regression: PGS's and E-CLIP's released code read values back in every sweep and every batch."""
    context = full_context(student, teacher, pictures)
    read_back = {"item", "tolist", "numpy", "nonzero", "masked_select", "__bool__", "__int__", "__float__", "__index__",
                 "allclose", "equal", "cpu", "unique", "is_nonzero"}  # fmt: skip
    with Calls() as calls:
        float(torch.ones(1).item() + bool(torch.ones(1)))
    assert len(calls.seen & read_back) == 2, "the recorder must see such calls"
    with Calls() as calls:
        mask(MaskSpec(masker=name, keep=0.5), context)
        mask(MaskSpec(masker=name, keep=0.5, least=0.3), context)
    assert len(calls.seen) > 3 and not calls.seen & read_back


def test_keep_one_masks_nothing(student, pictures):
    assert mask(MaskSpec(), MaskContext(image_BCHW=pictures, patch_size=8, generator=chance())) is None
    torch.testing.assert_close(encode(student, pictures, "random", 1.0, chance()), student(pictures))


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(masker="atentive"), "attentive"),
        (dict(keep=0.0), r"\(0, 1\]"),
        (dict(block=0), "1 .patches. or more"),
        (dict(rest="fould"), "fold"),
        (dict(keep=0.5, least=0.7), r"keep=0\.5"),
        (dict(keep=0.5, least=0.3, block=2), "block=1"),
        (dict(keep=0.5, least=0.3, rest="fold"), "one count"),
    ],
)
def test_bad_specs_name_the_rule(changes, word):
    with pytest.raises(UserError, match=word):
        MaskSpec(**changes)


# selection


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.2, 0.24, 0.6, 1 / 25, 1.0]))
def test_selection_is_unchanged_by_monotone_maps_of_the_scores(seed, keep):
    score_BN = torch.randn(3, 25, generator=chance(seed))
    noise_BN = torch.rand(3, 25, generator=chance(1))
    found = select(score_BN, (5, 5), keep, tie_BN=noise_BN).keep_BK
    assert found.shape[1] == max(1, round(25 * keep))
    for other_BN in (score_BN.exp(), 3 * score_BN - 7, score_BN**3):
        assert torch.equal(select(other_BN, (5, 5), keep, tie_BN=noise_BN).keep_BK, found)


def test_ties_fall_to_the_lowest_index_without_chance_and_to_chance_with_it():
    score_BN = torch.zeros(2000, 16)
    assert select(score_BN[:1], GRID, 0.25).keep_BK.tolist() == [[0, 1, 2, 3]]
    count_N = (
        select(score_BN, GRID, 0.5, tie_BN=torch.rand(2000, 16, generator=chance()))
        .keep_BK.flatten()
        .bincount(minlength=16)
    )
    # chi-square with 15 degrees of freedom; half of 16 kept halves the variance of a binomial count
    statistic = float(((count_N - 1000) ** 2 / 500).sum()) * 15 / 16
    assert statistic < 37.7, "positions are not kept equally often (p < 0.001): raster bias"


def test_count_of_released_recipes():
    assert MaskSpec(keep=0.5, block=2).num_kept((14, 14)) == 100
    assert [MaskSpec(keep=keep).num_kept((14, 14)) for keep in (0.7, 0.5, 0.25)] == [137, 98, 49]
    assert MaskSpec(keep=20 / 49, block=2).num_kept((14, 14)) == 80
    assert MaskSpec(keep=0.2).num_kept((5, 5)) == 5


def test_blocks_are_whole_and_pooled_by_their_mean():
    score_BN = torch.randn(3, 16 * 16, generator=chance(2))
    pooled_BU = pool_blocks(score_BN, (16, 16), 2)
    torch.testing.assert_close(pooled_BU, F.avg_pool2d(score_BN.view(3, 1, 16, 16), 2).flatten(1))
    resized = F.interpolate(score_BN.view(3, 1, 16, 16), (8, 8), mode="bilinear", align_corners=False).flatten(1)
    torch.testing.assert_close(pooled_BU, resized)
    keep_BK = select(score_BN, (16, 16), 0.5, block=2).keep_BK
    kept = torch.zeros(3, 256).scatter(1, keep_BK, 1.0).view(3, 1, 16, 16)
    share = F.avg_pool2d(kept, 2)
    assert set(share.unique().tolist()) == {0.0, 1.0} and share.sum((1, 2, 3)).tolist() == [32.0] * 3
    assert expand_blocks(torch.tensor([[3, 0]]), (4, 4), 2).tolist() == [[0, 1, 4, 5, 10, 11, 14, 15]]
    with pytest.raises(ValueError, match="block=2"):
        pool_blocks(torch.zeros(1, 15), (3, 5), 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(-2, 2), st.floats(-3, 3))
def test_bounded_counts_stay_in_their_bounds(seed, threshold, shift):
    score_BN = torch.randn(5, 20, generator=chance(seed)) + shift
    found = select_bounded(score_BN, 0.25, 0.7, threshold)
    count_B = found.valid_BK.sum(1)
    assert found.keep_BK.shape == (5, 14)
    assert torch.equal(count_B, (score_BN > threshold).sum(1).clamp(5, 14))
    for row in range(5):
        real, N = found.keep_BK[row, : count_B[row]], int(count_B[row])
        assert found.valid_BK[row, :N].all() and (real.diff() > 0).all()
        assert set(real.tolist()) == set(score_BN[row].topk(N).indices.tolist())
        assert len(set(found.keep_BK[row].tolist())) == 14


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 0.9))
def test_threshold_search_meets_its_target(seed, mean_keep):
    score_BN = torch.rand(8, 500, generator=chance(seed)) - 1
    threshold = search_threshold(score_BN, mean_keep)
    assert abs(float((score_BN > threshold).float().mean()) - mean_keep) < 1e-3
    tied_BN = (score_BN > -0.5).float()  # a step function: must end, and on the safe side
    assert float((tied_BN > search_threshold(tied_BN, 0.3)).float().mean()) <= 0.3


# what the tower makes of it


def test_masked_patches_reach_neither_the_feature_nor_a_gradient(student, pictures):
    keep_BK = select(torch.rand(4, 16, generator=chance()), GRID, 0.5).keep_BK
    image_BCHW = pictures.clone().requires_grad_()
    encode_masked(student, student.embed(image_BCHW), Selection(keep_BK)).square().sum().backward()
    moved_BN = F.avg_pool2d(image_BCHW.grad.abs().sum(1, keepdim=True), 8).flatten(1) > 0
    assert torch.equal(moved_BN, torch.zeros(4, 16, dtype=torch.bool).scatter(1, keep_BK, True))


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_order_of_the_kept_patches_does_not_matter_and_all_of_them_is_the_dense_tower(pool, pictures):
    tower = make_tower(seed=2, pool=pool)
    x_BLC = tower.embed(pictures)
    keep_BK = torch.rand(4, 16, generator=chance()).argsort(1)
    whole = tower.proj(encode_masked(tower, x_BLC, Selection(keep_BK.sort(1).values)))
    torch.testing.assert_close(whole, tower(pictures), atol=1e-5, rtol=1e-5)
    half = [encode_masked(tower, x_BLC, Selection(keep)) for keep in (keep_BK[:, :8], keep_BK[:, :8].flip(1))]
    torch.testing.assert_close(half[0], half[1], atol=1e-5, rtol=1e-5)


def test_gather_equals_a_loop_and_positions_travel_along(student, pictures):
    x_BLC = student.embed(pictures)
    keep_BK = select(torch.randn(4, 16, generator=chance()), GRID, 0.4).keep_BK
    together = encode_masked(student, x_BLC, Selection(keep_BK))
    for row in range(4):
        kept = torch.cat([x_BLC[row, :1], x_BLC[row, 1 + keep_BK[row]]])[None]
        torch.testing.assert_close(together[row : row + 1], student.finish_pooled(kept, 0), atol=1e-5, rtol=1e-5)
    marked = torch.arange(17.0).expand(4, -1)[..., None] + torch.zeros(4, 17, 32)
    seen = {}
    handle = student.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    encode_masked(student, marked, Selection(keep_BK))
    handle.remove()
    assert torch.equal(seen["x"][:, 1:, 0].long() - 1, keep_BK) and (seen["x"][:, 0] == 0).all()


@pytest.mark.parametrize("name", sorted(MASKERS))
def test_the_mask_is_really_on(name, student, teacher, pictures):
    """Regression: A-CLIP's documented command trains with all patches."""
    lengths = []
    handle = student.blocks[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    x_BLC = student.embed(pictures)
    context = full_context(student, teacher, pictures)
    for rest in ("drop", "fold"):
        encode_masked(student, x_BLC, mask(MaskSpec(masker=name, keep=0.5, rest=rest), context), rest)
    encode_masked(student, x_BLC, None)
    handle.remove()
    assert lengths == [1 + 8, 1 + 8, 1 + 16]


def test_fold_brings_the_rest_into_the_feature(student, pictures):
    x_BLC = student.embed(pictures)
    selection = select(torch.randn(4, 16, generator=chance()), GRID, 0.5)
    dropped, folded = (encode_masked(student, x_BLC, selection, rest) for rest in ("drop", "fold"))
    assert not torch.allclose(dropped, folded, atol=1e-3)
    image_BCHW = pictures.clone().requires_grad_()
    encode_masked(student, student.embed(image_BCHW), selection, "fold").square().sum().backward()
    assert (F.avg_pool2d(image_BCHW.grad.abs().sum(1, keepdim=True), 8) > 0).all()
    everything = Selection(torch.arange(16).expand(4, -1))
    torch.testing.assert_close(
        encode_masked(student, x_BLC, everything, "fold"), student.finish_pooled(x_BLC, 0), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_padding_changes_nothing(pool, pictures):
    """Regression: PGS's released mask blocks nothing and belongs to other samples; the obvious mend gives NaN."""
    tower = make_tower(seed=3, pool=pool)
    image_BCHW = pictures[:3]
    x_BLC = tower.embed(image_BCHW).requires_grad_()
    count_B = torch.tensor([1, 4, 7])
    keep_BK = torch.rand(3, 16, generator=chance()).argsort(1)[:, :7]
    padded = Selection(keep_BK, torch.arange(7) < count_B[:, None])
    found = encode_masked(tower, x_BLC, padded)
    assert found.isfinite().all()
    found.square().sum().backward()
    for row, count in enumerate(count_B.tolist()):
        alone = encode_masked(tower, x_BLC[row : row + 1], Selection(keep_BK[row : row + 1, :count]))
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        assert (x_BLC.grad[row, 1 + keep_BK[row, count:]] == 0).all()
        assert (x_BLC.grad[row, 1 + keep_BK[row, :count]] != 0).any()
    garbage_BLC = x_BLC.detach().clone()
    for row, count in enumerate(count_B.tolist()):
        garbage_BLC[row, 1 + keep_BK[row, count:]] = 1e4
    torch.testing.assert_close(encode_masked(tower, garbage_BLC, padded), found.detach(), atol=1e-5, rtol=1e-5)


def test_the_key_mask_belongs_to_its_picture_in_every_head(student, monkeypatch):
    """Regression: PGS's released mask is repeated head by head where the attention counts sample by sample."""
    given = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        logits = q @ k.mT * q.shape[-1] ** -0.5
        given.append((logits + attn_mask).softmax(-1))
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x_BLC = torch.randn(3, 17, 32, generator=chance())
    valid_BK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    encode_masked(student, x_BLC, Selection(torch.arange(4).expand(3, -1), valid_BK))
    assert len(given) == 4
    for weight_BHQK in given:
        blocked = weight_BHQK[..., 1:].transpose(1, 3)[~valid_BK]
        allowed = weight_BHQK[..., 1:].transpose(1, 3)[valid_BK]
        assert (blocked == 0).all() and (allowed > 0).all()


def test_bfloat16_masks_and_pads_alike(student, teacher, pictures):
    x_BLC = student.embed(pictures)
    selection = Selection(torch.arange(7).expand(4, -1), torch.arange(7) < torch.tensor([[1], [3], [5], [7]]))
    with torch.autocast("cpu", torch.bfloat16):
        padded = encode_masked(student, x_BLC, selection)
        folded = encode_masked(student, x_BLC, Selection(selection.keep_BK), "fold")
        kept = [
            mask(MaskSpec(masker=n, keep=0.5), full_context(student, teacher, pictures)) for n in ("pgs", "cluster")
        ]
    assert F.cosine_similarity(padded.float(), encode_masked(student, x_BLC, selection)).min() > 0.99
    expected = encode_masked(student, x_BLC, Selection(selection.keep_BK), "fold")
    assert F.cosine_similarity(folded.float(), expected).min() > 0.99
    exact = mask(MaskSpec(masker="cluster", keep=0.5), full_context(student, teacher, pictures))
    assert torch.equal(kept[1].keep_BK, exact.keep_BK) and kept[0].keep_BK.shape == (4, 8)


# the teacher's maskers


def test_high_is_the_complement_of_low_and_mixed_has_its_shares():
    score_BN = torch.randn(200, 16, generator=chance(3))
    picked = {}
    for strategy in ("low", "high", "mixed"):
        context = MaskContext(
            image_BCHW=torch.zeros(200, 3, 32, 32), patch_size=8, generator=chance(), teacher=stub_view(score_BN, GRID)
        )
        picked[strategy] = select(AttentiveMasker(strategy=strategy)(context), GRID, 0.5).keep_BK
    for low, high in zip(picked["low"].tolist(), picked["high"].tolist()):
        assert not set(low) & set(high) and len(set(low) | set(high)) == 16
    rank_BN = score_BN.argsort(1, descending=True).argsort(1)
    share_N = rank_BN.gather(1, picked["mixed"]).flatten().bincount(minlength=16) / 200
    assert (share_N[:4] == 1).all() and (share_N[12:] == 0).all()
    assert ((share_N[4:12] - 0.5).abs() < 0.15).all()
    with pytest.raises(ValueError, match="low, high, mixed"):
        AttentiveMasker(strategy="lo")(context)


def test_attentive_is_the_mean_over_blocks_and_text_is_cosine(student, teacher, pictures):
    context = full_context(student, teacher, pictures)
    torch.testing.assert_close(MASKERS["attentive"](context), context.teacher.attention_BSN.mean(1))
    last = AttentiveMasker(num_blocks=1)(context)
    torch.testing.assert_close(last, context.teacher.attention_BSN[:, -1])
    expected = F.cosine_similarity(context.teacher.patch_feature_BND, context.text_BD[:, None], dim=-1)
    torch.testing.assert_close(MASKERS["text"](context), expected)


def test_half_resolution_scores_are_the_blocks_own():
    score_BU = torch.randn(2, 49, generator=chance(4))
    context = MaskContext(
        image_BCHW=torch.zeros(2, 3, 112, 112),
        patch_size=8,
        generator=chance(),
        teacher=stub_view(score_BU, (7, 7)),
        block=2,
    )
    torch.testing.assert_close(AttentiveMasker()(context), score_BU)
    keep_BK = mask(MaskSpec(masker="attentive", keep=0.5, block=2), context).keep_BK
    assert torch.equal(keep_BK, expand_blocks(score_BU.topk(25).indices, (14, 14), 2))
    patches = AttentiveMasker()(replace(context, block=1))
    assert patches.shape == (2, 196)
