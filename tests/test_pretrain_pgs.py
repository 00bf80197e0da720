"""Parts of cluster masking and PGS: edges, similarity, Sinkhorn, anchors, and the two maskers made of them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from patchrank.pretrain.maskers import MASKERS, MaskContext, MaskSpec, mask
from patchrank.pretrain.masking.anchors import draw_anchors, num_anchors
from patchrank.pretrain.masking.cluster import ClusterMasker
from patchrank.pretrain.masking.keep_set import expand_blocks, select_bounded
from patchrank.pretrain.masking.pgs import CANDIDATE_SCORE, PgsMasker, protected_patches
from patchrank.pretrain.masking.similarity import blended_cosine, unit_patches
from patchrank.pretrain.masking.sinkhorn import sinkhorn_plan
from patchrank.pretrain.masking.sobel import edge_map

STD = (0.27, 0.26, 0.28)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def natural_like(B, size=64, seed=0):
    """Pictures (B, 3, size, size) in [0, 1] with smooth shading, one sharp object each and a little grain."""
    coarse = torch.rand(B, 3, 4, 4, generator=chance(seed))
    image_BCHW = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    corner_B2 = torch.randint(8, size // 2, (B, 2), generator=chance(seed + 1)).tolist()
    for row, (top, left) in enumerate(corner_B2):
        image_BCHW[row, :, top : top + 20, left : left + 20] += torch.rand(3, 1, 1, generator=chance(seed + row)) * 0.8
    return (image_BCHW + 0.01 * torch.randn(image_BCHW.shape, generator=chance(seed + 2))).clamp(0, 1)


def normalised(image_BCHW):
    std_C11 = torch.tensor(STD)[:, None, None]
    return (image_BCHW - 0.5) / std_C11


def context(B=3, seed=0, noise_seed=0, **changes):
    image_BCHW = natural_like(B, seed=seed)
    return MaskContext(
        **dict(
            image_BCHW=normalised(image_BCHW),
            patch_size=8,
            generator=chance(noise_seed),
            pixel_std=STD,
            progress=0.5,
            token_BNC=torch.randn(B, 64, 16, generator=chance(seed + 9)),
        )
        | changes
    )


# Sinkhorn


def cosines(B=2, N=64, seed=0):
    feature = F.normalize(torch.randn(B, N, 16, generator=chance(seed)), dim=-1)
    return feature @ feature.mT


def error_of(plan):
    return max(float((plan.sum(axis) - 1).abs().max()) for axis in (-1, -2))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99))
def test_plan_is_doubly_stochastic_symmetric_and_positive(seed):
    similarity = cosines(seed=seed)
    assert error_of(sinkhorn_plan(similarity, num_sweeps=10)) < 1e-3
    plan = sinkhorn_plan(similarity, num_sweeps=20)
    assert error_of(plan) < 1e-5 and (plan > 0).all()
    torch.testing.assert_close(plan, plan.mT)
    torch.testing.assert_close(sinkhorn_plan(similarity + 3.0), plan, rtol=1e-4, atol=1e-7)
    order = torch.randperm(64, generator=chance(seed))
    torch.testing.assert_close(sinkhorn_plan(similarity[:, order][:, :, order]), plan[:, order][:, :, order])


def test_error_falls_with_every_sweep_and_a_constant_matrix_is_done_at_once():
    """Regression: PGS's released sweeps swing between two states on a constant matrix and diverge on cosines."""
    similarity = cosines(seed=5).double()
    errors = [error_of(sinkhorn_plan(similarity, num_sweeps=sweeps)) for sweeps in range(1, 15)]
    assert all(later <= former for former, later in pairwise(errors)) and errors[-1] < errors[0] / 100
    for constant in (-0.7, 0.0, 1.0):
        plan = sinkhorn_plan(torch.full((1, 50, 50), constant), num_sweeps=1)
        torch.testing.assert_close(plan, torch.full((1, 50, 50), 1 / 50))


def test_extremes_and_low_precision():
    signs = torch.sign(torch.randn(1, 30, 30, generator=chance(0)))
    extreme = torch.tril(signs) + torch.tril(signs, -1).mT
    plan = sinkhorn_plan(extreme, temperature=0.01)
    assert plan.isfinite().all() and (plan >= 0).all()
    similarity = cosines(seed=2)
    for dtype in (torch.float16, torch.bfloat16):
        exact = sinkhorn_plan(similarity.to(dtype).float())
        torch.testing.assert_close(sinkhorn_plan(similarity.to(dtype)), exact)


# edges


def slow_edges(image_CHW, side):
    """Mean Sobel magnitude of brightness by scipy, min-max; (N,) float64."""
    brightness = (image_CHW.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(0)
    parts = [ndimage.sobel(brightness.numpy(), axis=axis, mode="nearest") for axis in (0, 1)]
    pooled = F.avg_pool2d(torch.hypot(*map(torch.from_numpy, parts))[None, None], side).flatten()
    return (pooled - pooled.min()) / (pooled.max() - pooled.min())


def test_edges_equal_scipy_s_sobel_in_float64():
    """Regression: PGS's released map is rounding noise (rank correlation with float64 0.46-0.71)."""
    image_BCHW = natural_like(4)
    found = edge_map(normalised(image_BCHW), 8, STD)
    expected = torch.stack([slow_edges(image, 8) for image in image_BCHW])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)
    assert all(stats.spearmanr(a, b).statistic > 0.999 for a, b in zip(found, expected))
    assert (found.std(1) > 0.05).all()


def test_flat_pictures_have_no_edges_and_no_border():
    for value in (0.0, 0.3, -2.0):
        assert (edge_map(torch.full((2, 3, 32, 32), value), 8) == 0).all()


def test_rounding_noise_is_no_edge():
    noise_BCHW = 1e-7 * torch.randn(2, 3, 32, 32, generator=chance())
    assert all((edge_map(value + noise_BCHW, 8) == 0).all() for value in (0.3, -2.0))


def test_equal_edges_are_protected_by_chance():
    """Regression: in the released code ties go by raster order, here to the first rows of stripes."""
    stripes = (torch.arange(64) % 8 < 4).float().expand(400, 3, 64, 64).contiguous()
    tie_BN = torch.rand(400, 64, generator=chance())
    protected_BN = protected_patches(edge_map(stripes, 8), 0.3, tie_BN)
    assert (protected_BN.sum(1) == 19).all()
    score_BN = PgsMasker()(context(B=400, image_BCHW=stripes, progress=0.0))
    for count_R in (part.view(400, 8, 8).sum((0, 2)).double() for part in (protected_BN, score_BN > 50)):
        assert float(((count_R - 950) ** 2 / 950).sum()) < 24.3, "uneven rows (chi-square, p < 0.001)"


def test_a_step_is_an_edge_where_it_is():
    image_BCHW = torch.zeros(1, 3, 64, 64)
    image_BCHW[..., 31:] = 1.0
    edge_BN = edge_map(image_BCHW, 8)
    assert (edge_BN.view(8, 8) > 0).nonzero()[:, 1].unique().tolist() == [3]
    assert protected_patches(edge_BN, 0.3).view(8, 8).any(0).nonzero().flatten().tolist() == [3]


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 5), st.floats(-2, 2))
def test_edges_do_not_depend_on_brightness_and_contrast(gain, offset):
    image_BCHW = natural_like(2)
    torch.testing.assert_close(edge_map(gain * image_BCHW + offset, 8), edge_map(image_BCHW, 8), atol=2e-3, rtol=1e-2)


def test_edges_are_of_pixels_not_of_patch_means():
    """Shuffling pixels inside patches must change the map (the released one is a function of patch statistics)."""
    image_BCHW = natural_like(1)
    patch = F.unfold(image_BCHW, 8, stride=8).view(1, 3, 64, 64)
    shuffled = F.fold(patch[:, :, torch.randperm(64, generator=chance(1))].flatten(1, 2), (64, 64), 8, stride=8)
    assert not torch.allclose(edge_map(shuffled, 8), edge_map(image_BCHW, 8), atol=0.05)


# similarity and anchors


def test_cosines_of_patches():
    image_BCHW = natural_like(2)
    image_BCHW[0, :, :8, :8] = 0.4  # flat: rounding must not become a direction
    unit_BNM = unit_patches(image_BCHW, 8)
    assert (unit_BNM[0, 0, :-1] == 0).all() and unit_BNM[0, 0, -1] == 1 and unit_BNM.isfinite().all()
    patch = image_BCHW[1, :, 8:16, 24:32].flatten()
    torch.testing.assert_close(unit_BNM[1, 8 + 3, :-1], F.normalize(patch - patch.mean(), dim=0))
    token_BNC = torch.randn(2, 64, 5, generator=chance())
    whole = blended_cosine(None, unit_BNM, token_BNC, 0.25)
    expected = 0.75 * F.cosine_similarity(unit_BNM[1, 3], unit_BNM[1, 7], 0)
    expected = expected + 0.25 * F.cosine_similarity(token_BNC[1, 3], token_BNC[1, 7], 0)
    torch.testing.assert_close(whole[1, 3, 7], expected)
    index_BQ = torch.tensor([[5, 9], [0, 63]])
    some = blended_cosine(index_BQ, unit_BNM, token_BNC, 0.25)
    torch.testing.assert_close(some[1], whole[1, [0, 63]])
    assert torch.equal(blended_cosine(index_BQ, unit_BNM, None, 0.0), blended_cosine(index_BQ, unit_BNM, token_BNC, 0))
    assert torch.equal(blended_cosine(None, None, token_BNC, 1.0), blended_cosine(None, unit_BNM, token_BNC, 1.0))


def test_anchors_are_counted_as_released_and_drawn_evenly():
    assert [num_anchors(share, 196) for share in (0.03, 0.05)] == [6, 10]
    assert num_anchors(0.03, 9) == 1
    noise_BN = torch.rand(4000, 16, generator=chance())
    count_N = draw_anchors(noise_BN, 4).flatten().bincount(minlength=16)
    assert float(((count_N - 1000) ** 2 / 750).sum()) * 15 / 16 < 37.7
    barred_BN = torch.arange(16).expand(4000, -1) < 13
    assert draw_anchors(noise_BN, 3, barred_BN).min() == 13
    assert len(draw_anchors(noise_BN, 5, barred_BN)[0].unique()) == 5


# the maskers


@pytest.mark.parametrize("name", ["pgs", "pgs-no-transport", "pgs-pixels"])
def test_protected_patches_stay_and_candidates_fall(name):
    chosen = context()
    masker = MASKERS[name]
    score_BN = masker(chosen)
    protected_BN = protected_patches(edge_map(chosen.image_BCHW, 8, STD), 0.3)
    candidate_BN = score_BN == CANDIDATE_SCORE
    assert (protected_BN.sum(1) == 19).all() and (candidate_BN.sum(1) == num_anchors(0.05, 64)).all()
    assert not (protected_BN & candidate_BN).any()
    for keep in (0.5, 0.7):
        keep_BK = mask(MaskSpec(masker=name, keep=keep), replace(chosen, generator=chance())).keep_BK
        kept_BN = torch.zeros(3, 64, dtype=torch.bool).scatter(1, keep_BK, True)
        assert kept_BN[protected_BN].all() and not kept_BN[candidate_BN].any()
    few_BK = mask(MaskSpec(masker=name, keep=0.125), replace(chosen, generator=chance())).keep_BK
    strongest_BK = edge_map(chosen.image_BCHW, 8, STD).topk(8).indices.sort(1).values
    assert torch.equal(few_BK, strongest_BK), "too little room: the weakest edges must give way first"


def test_the_transport_plan_changes_what_is_kept():
    """Regression: added as it is, a plan's entries are about 1 / N and change next to nothing."""
    kept = []
    for transport in (True, False):
        seen = context(B=16, progress=0.0)
        kept.append(PgsMasker(edges=False, transport=transport)(seen).topk(32).indices)
    same_B2N = torch.stack([torch.zeros(16, 64).scatter(1, index_BK, 1.0) for index_BK in kept])
    assert float((same_B2N[0] * (1 - same_B2N[1])).sum(1).mean()) >= 1


@pytest.mark.parametrize("name", ["cluster-embedding", "pgs", "pgs-no-transport"])
def test_a_score_has_no_graph(name):
    seen = context()
    seen = replace(seen, image_BCHW=seen.image_BCHW.requires_grad_(), token_BNC=seen.token_BNC.requires_grad_())
    assert not MASKERS[name](seen).requires_grad


@pytest.mark.parametrize("name", ["cluster", "pgs-pixels"])
def test_scores_are_float32_under_autocast(name, monkeypatch):
    found = []

    class Spy(type(MASKERS[name])):
        def __call__(self, context):
            found.append(super().__call__(context))
            return found[-1]

    monkeypatch.setitem(MASKERS, name, Spy())
    mask(MaskSpec(masker=name, keep=0.5), context())
    with torch.autocast("cpu", torch.bfloat16):
        mask(MaskSpec(masker=name, keep=0.5), context())
    assert found[1].dtype == torch.float32 and torch.equal(*found)


def test_bounded_counts_break_ties_by_chance():
    flat = MaskContext(image_BCHW=torch.full((2000, 3, 16, 16), 0.3), patch_size=4, generator=chance())
    found = mask(MaskSpec(masker="cluster", keep=0.5, least=0.25, threshold=-0.5), flat)
    count_N = found.keep_BK[found.valid_BK].bincount(minlength=16).double()
    mean = float(count_N.mean())
    assert float(((count_N - mean) ** 2 / mean).sum()) < 37.7, "raster bias (chi-square, p < 0.001)"


@pytest.mark.parametrize("transport", [False, True])
def test_scores_equal_a_plain_loop(transport):
    masker = PgsMasker(edges=False, transport=transport, candidates=0.05, plan_weight=0.5)
    chosen = context(B=2)
    score_BN = masker(chosen)
    token_BNC = F.normalize(chosen.token_BNC, dim=-1)
    for row in range(2):
        patches = F.unfold(chosen.image_BCHW[row : row + 1], 8, stride=8)[0].T
        pixel = F.normalize(patches - patches.mean(1, keepdim=True), dim=1)
        S = 0.5 * pixel @ pixel.T + 0.5 * token_BNC[row] @ token_BNC[row].T
        Q = S
        if transport:
            K = (S.double() / 0.1).exp()
            scale = torch.ones(64, dtype=torch.float64)
            for _ in range(10):
                scale = (scale / (K @ scale)).sqrt()
            plan = (scale[:, None] * K * scale).fill_diagonal_(0)
            Q = S + 0.5 * plan / plan.amax(1, keepdim=True)
        candidates = (score_BN[row] == CANDIDATE_SCORE).nonzero().flatten().tolist()
        assert len(candidates) == 4
        for patch in set(range(64)) - set(candidates):
            expected = -max(float(Q[candidate, patch]) for candidate in candidates)
            assert float(score_BN[row, patch]) == pytest.approx(expected, abs=1e-4)


def test_candidates_are_drawn_anew_by_every_seed():
    """Regression: in the released code 1e6 x edge swamps the noise, so candidates never change."""
    overlap = []
    for seed in range(6):
        former, latter = (PgsMasker()(context(noise_seed=s)) == CANDIDATE_SCORE for s in (seed, seed + 100))
        overlap.append(float((former & latter).sum() / former.sum()))
    assert sum(overlap) / 6 < 0.5


def test_kept_patches_hold_more_edge_with_protection_than_without():
    edge_BN = edge_map(context(B=8).image_BCHW, 8, STD)
    means = {}
    for name in ("pgs", "pgs-no-edges"):
        keep_BK = mask(MaskSpec(masker=name, keep=0.5), context(B=8)).keep_BK
        means[name] = float(edge_BN.gather(1, keep_BK).mean())
    assert means["pgs"] > means["pgs-no-edges"] + 0.05


def test_embeddings_come_in_with_progress():
    other = torch.randn(3, 64, 16, generator=chance(77))
    brighter = context().image_BCHW.flip(0)
    for masker in (PgsMasker(edges=False), PgsMasker(edges=False, transport=False), ClusterMasker(embedding=True)):
        score = lambda **changes: masker(context(**changes))  # noqa: B023, E731
        assert torch.equal(score(progress=0.0), score(progress=0.0, token_BNC=other))
        assert torch.equal(score(progress=1.0), score(progress=1.0, image_BCHW=brighter))
        assert not torch.equal(score(progress=0.5), score(progress=0.5, token_BNC=other))
        assert torch.equal(score(progress=1.0), score(progress=1.7)), "a longer run must not extrapolate"
    assert PgsMasker(embedding=False)(context(token_BNC=None)).isfinite().all()


@pytest.mark.parametrize("name", ["cluster", "pgs", "pgs-no-transport", "pgs-no-edges"])
def test_a_flat_picture_falls_back_to_chance(name):
    flat_BCHW = torch.full((400, 3, 16, 16), 0.3)
    flat = MaskContext(image_BCHW=flat_BCHW, patch_size=4, generator=chance())
    score_BN = MASKERS[name](flat)
    lowest_BN = score_BN <= score_BN.amin(1, keepdim=True)
    assert (lowest_BN.sum(1) == 1).all(), "the anchor must fall first"
    count_N = mask(MaskSpec(masker=name, keep=0.5), flat).keep_BK.flatten().bincount(minlength=16)
    assert float(((count_N - 200) ** 2 / 100).sum()) * 15 / 16 < 37.7, "raster bias (chi-square, p < 0.001)"


def test_an_anchor_drags_its_own_kind_along_first():
    """Two textures: as long as one half is not used up, the other half of the picture stays."""
    texture = torch.randn(2, 3, 8, 8, generator=chance(3))
    image_BCHW = torch.cat([texture[:1].tile(1, 1, 8, 4), texture[1:].tile(1, 1, 8, 4)], dim=3)
    left_N = (torch.arange(64) % 8) < 4
    for masker in (
        ClusterMasker(share=1 / 64),
        PgsMasker(edges=False, candidates=1 / 64),
        PgsMasker(edges=False, transport=False, candidates=1 / 64),
    ):
        seen = context(B=1, image_BCHW=image_BCHW, progress=0.0)
        score_N = masker(seen)[0]
        same_N = left_N == left_N[score_N.argmin()]
        assert score_N[same_N].max() < score_N[~same_N].min() - 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 63), st.integers(0, 99), st.booleans())
def test_more_likeness_to_an_anchor_never_saves_a_patch(patch, seed, pgs):
    """A patch pulled towards an anchor's embedding can only lose rank."""
    masker = PgsMasker(edges=False, transport=False) if pgs else ClusterMasker(embedding=True)
    before = context(B=1, progress=1.0, noise_seed=seed)
    score_N = masker(before)[0]
    anchor = int(score_N.argmin())
    token_BNC = F.normalize(before.token_BNC, dim=-1)
    moved_BNC = token_BNC.clone()
    moved_BNC[0, patch] = F.normalize(token_BNC[0, patch] + 3 * token_BNC[0, anchor], dim=-1)
    after_N = masker(replace(before, token_BNC=moved_BNC, generator=chance(seed)))[0]
    place = lambda scores_N: int((scores_N < scores_N[patch]).sum())  # noqa: E731
    if patch != anchor and score_N[patch] > -2.0:
        nearest = -float(score_N[patch])
        pulled = float(moved_BNC[0, patch] @ token_BNC[0, anchor])
        if pulled >= nearest:
            assert place(after_N) <= place(score_N)


def test_a_threshold_above_one_masks_anchors_only():
    bounded = MaskSpec(masker="cluster", keep=1.0, least=0.01, threshold=-1.1)
    chosen = mask(bounded, context())
    assert (chosen.valid_BK.sum(1) == 64 - num_anchors(0.03, 64)).all()


def test_ratio_per_picture_follows_the_picture():
    uniform = natural_like(1)
    busy = torch.rand(1, 3, 64, 64, generator=chance(4))
    stripes = (torch.arange(64) % 8 < 4).float().expand(1, 3, 64, 64)
    image_BCHW = torch.cat([uniform, busy, stripes])
    spec = MaskSpec(masker="cluster", keep=0.7, least=0.3, threshold=-0.5)
    count_B = mask(spec, context(image_BCHW=image_BCHW)).valid_BK.sum(1)
    assert count_B[1] == 45 and count_B[2] == 19, "noise resembles nothing, stripes resemble each other"
    assert 19 <= count_B[0] <= 45


def test_flat_background_is_dragged_along_by_one_of_its_patches():
    """Regression: resembling nothing, an even background stays and the object falls."""
    image_BCHW = torch.full((200, 3, 64, 64), 0.9)
    image_BCHW[..., 16:48, 16:48] = torch.rand(200, 3, 32, 32, generator=chance(3))
    flat_N = torch.ones(8, 8, dtype=torch.bool)
    flat_N[2:6, 2:6] = False
    flat_N = flat_N.flatten()
    for masker in ("cluster", "pgs-no-edges"):
        seen = context(B=200, image_BCHW=image_BCHW, progress=0.0)
        keep_BK = mask(MaskSpec(masker=masker, keep=0.5), seen).keep_BK
        share_N = torch.zeros(200, 64).scatter(1, keep_BK, 1.0).mean(0)
        assert share_N[~flat_N].mean() > share_N[flat_N].mean() + 0.2, masker


def test_grids_need_not_be_square():
    image_BCHW = torch.rand(2, 3, 32, 64, generator=chance())
    patch = image_BCHW[1, :, 16:24, 40:48].flatten()
    expected = F.normalize(patch - patch.mean(), dim=0)
    torch.testing.assert_close(unit_patches(image_BCHW, 8)[1, 2 * 8 + 5, :-1], expected)
    spot_BCHW = torch.zeros(1, 3, 32, 64)
    spot_BCHW[..., 18:22, 42:46] = 1
    assert edge_map(spot_BCHW, 8).argmax() == 2 * 8 + 5
    assert expand_blocks(torch.tensor([[5]]), (4, 8), 2).tolist() == [[18, 19, 26, 27]]


@pytest.mark.system
def test_a_mask_compiles_without_a_break():
    seen, masker = context(), PgsMasker()

    def chosen(image_BCHW, token_BNC, noise_BN):
        protected_BN = protected_patches(edge_map(image_BCHW, 8, STD), 0.3, 1 - noise_BN)
        given = replace(seen, image_BCHW=image_BCHW, token_BNC=token_BNC)
        score_BN = -masker.resemblance(given, draw_anchors(noise_BN, 4, protected_BN)).amax(1)
        return select_bounded(score_BN, 0.3, 0.7, -0.5, tie_BN=noise_BN).keep_BK

    given = seen.image_BCHW, seen.token_BNC, torch.rand(3, 64, generator=chance())
    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(*given), chosen(*given))
