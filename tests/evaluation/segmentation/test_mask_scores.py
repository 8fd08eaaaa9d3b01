"""Metrics of masks and score maps against slow textbook forms; boxes; void pixels; known values on ECSSD."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ssl_vit.data.annotations.object_masks import Annotation, annotation_from_mask, component_boxes
from ssl_vit.evaluation.segmentation.iou import (
    center_prior,
    corloc_hit,
    downsample_mask,
    largest_box,
    pool_mask_to_patches,
)
from ssl_vit.evaluation.segmentation.mask_scores import (
    count_levels,
    f_beta,
    max_f_threshold,
    resize_annotation,
    scale_maps,
    score_attention,
    score_center_prior,
    score_masks,
    stack_mask_scores,
)
from ssl_vit.models.attention_maps import upsample_mask
from tests.reference.saliency import (
    slow_box,
    slow_components,
    slow_f,
    slow_f_curve,
    slow_max_f_dataset,
    slow_max_f_selfmask,
)


def blob(height: int, width: int, seed: int) -> torch.Tensor:
    noise = torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (height, width), mode="bicubic")[0, 0] > 0.55


def image(seed: int, size: tuple[int, int] = (53, 40)) -> tuple[torch.Tensor, torch.Tensor, Annotation]:
    """Make three score maps and masks of 6 x 5 patches, and an annotation with void around the foreground."""
    generator = torch.Generator().manual_seed(seed)
    score_maps = torch.randn(3, 6, 5, generator=generator)
    target = blob(*size, seed)
    void = F.max_pool2d(target[None].float(), 3, 1, 1)[0].bool() & ~target
    return score_maps, score_maps > 0.2, annotation_from_mask(target, ~void)


def enlarged(score_maps: torch.Tensor, annotation: Annotation) -> np.ndarray:
    """Return the valid pixels (M, pixels) of score maps at the image's size, in [0, 1]."""
    low, high = score_maps.amin((1, 2), keepdim=True), score_maps.amax((1, 2), keepdim=True)
    scaled = ((score_maps - low) / (high - low))[:, None]
    large = F.interpolate(scaled, tuple(annotation.foreground.shape), mode="bilinear", align_corners=False)[:, 0]
    return large.flatten(1).double().numpy()[:, annotation.valid.flatten().numpy()]


@pytest.mark.parametrize("seed", range(3))
def test_score_masks_equals_the_slow_forms_on_valid_pixels(seed):
    score_maps, masks, annotation = image(seed)
    result = score_masks(score_maps, masks, annotation)
    target = annotation.foreground[annotation.valid].numpy()
    for index, scaled in enumerate(enlarged(score_maps, annotation)):
        mask = upsample_mask(masks[index], tuple(annotation.foreground.shape))[annotation.valid].numpy()
        assert result.iou[index] == pytest.approx((mask & target).sum() / (mask | target).sum(), abs=1e-12)
        assert result.accuracy[index] == pytest.approx((mask == target).mean(), abs=1e-12)
        assert result.f[index] == pytest.approx(slow_f(mask, target, 0.3), abs=1e-12)
        assert result.f_curve[index].tolist() == pytest.approx(slow_f_curve(scaled, target, 0.3), abs=1e-6)
        assert result.f_selfmask[index] == pytest.approx(max(slow_f_curve(scaled, target, 0.09)), abs=1e-12)


def test_mask_scores_max_f_and_selfmask_max_f_differ():
    dataset, scores = [], []
    for seed in range(6):
        score_maps, masks, annotation = image(seed)
        scores.append(score_masks(score_maps[:1], masks[:1], annotation))
        dataset.append((enlarged(score_maps[:1], annotation)[0], annotation.foreground[annotation.valid].numpy()))
    stacked = stack_mask_scores(scores)
    values, threshold = max_f_threshold(stacked.f_curve[:, 0])
    assert values.mean() == pytest.approx(slow_max_f_dataset(dataset), abs=1e-6)
    assert stacked.f_selfmask.mean() == pytest.approx(slow_max_f_selfmask(dataset), abs=1e-9)
    assert abs(values.mean() - stacked.f_selfmask.mean()) > 0.01
    assert 0 <= threshold < 1


def test_max_f_threshold_is_shared_by_all_images():
    curves = torch.zeros(2, 255)
    curves[0, 10], curves[1, 20], curves[:, 30] = 1.0, 1.0, 0.6
    values, threshold = max_f_threshold(curves)
    assert values.tolist() == pytest.approx([0.6, 0.6])
    assert threshold == pytest.approx(30 / 255)


def test_f_beta_weighs_precision_more_for_smaller_beta():
    inside, chosen, area = (torch.tensor(float(number)) for number in (6, 8, 60))  # precise, but little of it
    assert f_beta(inside, chosen, area, 0.3) < f_beta(inside, chosen, area, 0.09)
    assert f_beta(torch.tensor(0.0), torch.tensor(0.0), area, 0.3) == 0
    assert f_beta(area, area, area, 0.3) == 1


@pytest.mark.parametrize(("value", "whole"), [(-2.7, False), (0.0, False), (1.0, True), (3.1, True)])
def test_count_levels_of_a_constant_map(value, whole):
    annotation = image(0)[2]
    chosen, inside = count_levels(torch.full((1, 3, 4), value), annotation.foreground, annotation.valid)
    assert (chosen == annotation.valid.sum() * whole).all()
    assert (inside == annotation.foreground.sum() * whole).all()
    assert scale_maps(torch.tensor([[[-1.0, 1.0, 3.0]]])).tolist() == [[[0, 0.5, 1]]]


def test_mask_scores_of_a_mask_have_its_f_at_every_threshold():
    masks = torch.stack([blob(40, 53, seed) for seed in range(2)] + [torch.zeros(40, 53, dtype=torch.bool)])
    scores = score_masks(masks.float(), masks, annotation_from_mask(blob(40, 53, 5)))
    assert torch.allclose(scores.f_curve.double(), scores.f[:, None].expand(-1, 255))


def test_score_masks_ignores_void_pixels():
    score_maps, masks, annotation = image(4)
    at_size = upsample_mask(masks, tuple(annotation.foreground.shape))
    flipped = at_size ^ ~annotation.valid
    assert (flipped != at_size).any()
    first, second = (score_masks(values.float(), values, annotation) for values in (at_size, flipped))
    for one, other in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one, other)
    maps = score_maps.softmax(-1)
    full = annotation._replace(valid=torch.ones_like(annotation.valid))
    assert not torch.equal(score_attention(maps, 0.6, annotation).curve, score_attention(maps, 0.6, full).curve)


def test_score_attention_scores_each_instance():
    instances = torch.zeros(2, 32, 32, dtype=torch.bool)
    instances[0, :16, :16], instances[1, 16:, 16:] = True, True
    annotation = annotation_from_mask(instances.any(0))._replace(instances=instances)
    maps = torch.full((2, 4, 4), 1e-6)
    maps[0, :2, :2], maps[1, 2:, 2:] = 1, 1  # each head attends to one object
    objects = score_attention(maps, 0.9, annotation).instance_ious
    assert objects[:, :2].tolist() == [[1, 0], [0, 1]]
    assert objects[:, 2].tolist() == pytest.approx([0.5, 0.5])  # the mean map covers both


# --- boxes ---


@pytest.mark.parametrize("seed", range(4))
def test_component_boxes_are_sorted_by_size(seed):
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(seed)) > 0.6
    parts = sorted(slow_components(mask.numpy()), key=len, reverse=True)
    boxes = component_boxes(mask).tolist()
    assert sorted(boxes) == sorted(slow_box(part) for part in parts)
    assert boxes[0] in [slow_box(part) for part in parts if len(part) == len(parts[0])]


@pytest.mark.parametrize("size", [(48, 64), (50, 61), (139, 200)])
def test_largest_box_of_patches_is_that_of_their_pixels(size):
    mask = torch.zeros(7, 5, dtype=torch.bool)
    mask[2:5, 1:4], mask[0, 0] = True, True
    part = max(slow_components(upsample_mask(mask, size).numpy()), key=len)
    assert largest_box(mask, size).tolist() == slow_box(part)


def test_corloc_hit_needs_an_iou_of_half_with_any_box():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :2] = True
    size = (40, 40)
    assert corloc_hit(mask, torch.tensor([[30, 30, 40, 40], [0, 0, 20, 10]]), size)  # half of it
    assert not corloc_hit(mask, torch.tensor([[0, 0, 20, 9], [19, 19, 40, 40]]), size)
    assert not corloc_hit(torch.zeros(4, 4, dtype=torch.bool), torch.tensor([[0, 0, 40, 40]]), size)


# --- real masks ---


def test_center_prior_has_known_values_on_ecssd(ecssd):
    """Of all 1,000 masks are known: whole image F .279; center prior F .524 and, at beta² .09, .513; acc .770."""
    targets = [np.asarray(Image.open(path)) > 0 for path in sorted((ecssd / "masks").glob("*.png"))]
    annotation = [annotation_from_mask(torch.from_numpy(target)) for target in targets]
    whole = stack_mask_scores(
        [score_masks(torch.ones(1, 2, 2), torch.ones(1, 2, 2).bool(), one) for one in annotation[::6]]
    )
    shares = np.array([target.mean() for target in targets[::6]])
    assert whole.iou[:, 0].numpy() == pytest.approx(shares)
    assert whole.accuracy[:, 0].numpy() == pytest.approx(shares)
    assert whole.f[:, 0].numpy() == pytest.approx(1.3 * shares / (0.3 * shares + 1))
    resized = [resize_annotation(one) for one in annotation]
    prior, threshold = center_prior(torch.stack([one.foreground for one in resized]))
    scores = stack_mask_scores(score_center_prior(resized, threshold)[0])
    assert torch.allclose(scores.iou[:, 0], prior)
    assert scores.accuracy.mean() == pytest.approx(0.770, abs=0.01)
    assert scores.f.mean() == pytest.approx(0.524, abs=0.015)
    assert scores.corloc.float().mean() > 0.4  # objects are central


def test_f_beta_of_the_same_mask_on_ecssd(ecssd):
    targets = [
        downsample_mask(torch.from_numpy(np.asarray(Image.open(path)) > 0)) for path in (ecssd / "masks").glob("*.png")
    ]
    mask = torch.stack(targets).float().mean(0) >= 0.3
    counts = [pool_mask_to_patches(target, (64, 64)) for target in targets]
    values = {
        beta: torch.stack(
            [f_beta((mask & t.foreground.bool()).sum(), mask.sum(), t.foreground.sum(), beta) for t in counts]
        )
        for beta in (0.3, 0.09)
    }
    assert values[0.3].mean() == pytest.approx(0.524, abs=0.015)
    assert values[0.09].mean() == pytest.approx(0.513, abs=0.015)
    assert values[0.3].mean() - values[0.09].mean() == pytest.approx(0.011, abs=0.005)
    measured = score_masks(mask[None].float(), mask[None], annotation_from_mask(targets[0]))
    assert measured.f[0] == pytest.approx(values[0.3][0].item())
