"""Measures of masks and soft maps against slow textbook forms; boxes; void pixels; known values on ECSSD."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ssl_vit.data.annotations.object_masks import Annotation, annotation_from_mask, component_boxes
from ssl_vit.evaluation.segmentation.iou import (
    box_iou,
    center_prior,
    corloc_hit,
    downsample_mask,
    largest_box,
    pool_mask_to_patches,
)
from ssl_vit.evaluation.segmentation.mask_scores import (
    mark_attention,
    mark_prior,
    resize_annotation,
    score_masks,
    stack_marks,
)
from ssl_vit.evaluation.segmentation.saliency_metrics import (
    count_levels,
    f_beta,
    max_f_threshold,
    saliency_scores,
    scale,
)
from ssl_vit.models.attention_maps import upsample_mask
from tests.reference.saliency import (
    slow_box,
    slow_box_iou,
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
    """Three soft maps and masks of 6 x 5 patches, and an object with void around it."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.randn(3, 6, 5, generator=generator)
    truth = blob(*size, seed)
    void = F.max_pool2d(truth[None].float(), 3, 1, 1)[0].bool() & ~truth
    return soft, soft > 0.2, annotation_from_mask(truth, ~void)


def enlarged(soft: torch.Tensor, annotation: Annotation) -> np.ndarray:
    """The counted pixels (M, pixels) of soft maps at the image's size, in 0..1."""
    low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    scaled = ((soft - low) / (high - low))[:, None]
    large = F.interpolate(scaled, tuple(annotation.foreground.shape), mode="bilinear", align_corners=False)[:, 0]
    return large.flatten(1).double().numpy()[:, annotation.valid.flatten().numpy()]


@pytest.mark.parametrize("seed", range(3))
def test_every_measure_equals_its_slow_form_without_the_void_pixels(seed):
    soft, masks, given = image(seed)
    result = score_masks(soft, masks, given).measures
    truth = given.foreground[given.valid].numpy()
    for index, scaled in enumerate(enlarged(soft, given)):
        mask = upsample_mask(masks[index], tuple(given.foreground.shape))[given.valid].numpy()
        assert result.iou[index] == pytest.approx((mask & truth).sum() / (mask | truth).sum(), abs=1e-12)
        assert result.accuracy[index] == pytest.approx((mask == truth).mean(), abs=1e-12)
        assert result.f[index] == pytest.approx(slow_f(mask, truth, 0.3), abs=1e-12)
        assert result.f_curve[index].tolist() == pytest.approx(slow_f_curve(scaled, truth, 0.3), abs=1e-6)
        assert result.f_selfmask[index] == pytest.approx(max(slow_f_curve(scaled, truth, 0.09)), abs=1e-12)


def test_the_two_published_maxima_are_two_numbers():
    dataset, marks = [], []
    for seed in range(6):
        soft, masks, given = image(seed)
        marks.append(score_masks(soft[:1], masks[:1], given))
        dataset.append((enlarged(soft[:1], given)[0], given.foreground[given.valid].numpy()))
    measures = stack_marks(marks).measures
    values, threshold = max_f_threshold(measures.f_curve[:, 0])
    assert values.mean() == pytest.approx(slow_max_f_dataset(dataset), abs=1e-6)
    assert measures.f_selfmask.mean() == pytest.approx(slow_max_f_selfmask(dataset), abs=1e-9)
    assert abs(values.mean() - measures.f_selfmask.mean()) > 0.01
    assert 0 <= threshold < 1


def test_one_threshold_serves_all_images():
    curves = torch.zeros(2, 255)
    curves[0, 10], curves[1, 20], curves[:, 30] = 1.0, 1.0, 0.6
    values, threshold = max_f_threshold(curves)
    assert values.tolist() == pytest.approx([0.6, 0.6])
    assert threshold == pytest.approx(30 / 255)


def test_f_weighs_precision_more_the_smaller_beta_is():
    inside, chosen, area = (torch.tensor(float(number)) for number in (6, 8, 60))  # precise, but little of it
    assert f_beta(inside, chosen, area, 0.3) < f_beta(inside, chosen, area, 0.09)
    assert f_beta(torch.tensor(0.0), torch.tensor(0.0), area, 0.3) == 0
    assert f_beta(area, area, area, 0.3) == 1


@pytest.mark.parametrize(("value", "whole"), [(-2.7, False), (0.0, False), (1.0, True), (3.1, True)])
def test_a_constant_map_chooses_the_whole_image_or_nothing(value, whole):
    given = image(0)[2]
    chosen, inside = count_levels(torch.full((1, 3, 4), value), given.foreground, given.valid)
    assert (chosen == given.valid.sum() * whole).all()
    assert (inside == given.foreground.sum() * whole).all()
    assert scale(torch.tensor([[[-1.0, 1.0, 3.0]]])).tolist() == [[[0, 0.5, 1]]]


def test_a_mask_as_soft_map_has_the_f_of_the_mask_at_every_threshold():
    masks = torch.stack([blob(40, 53, seed) for seed in range(2)] + [torch.zeros(40, 53, dtype=torch.bool)])
    measures = score_masks(masks.float(), masks, annotation_from_mask(blob(40, 53, 5))).measures
    assert torch.allclose(measures.f_curve.double(), measures.f[:, None].expand(-1, 255))


def test_what_a_mask_says_of_void_pixels_changes_nothing():
    soft, masks, given = image(4)
    at_size = upsample_mask(masks, tuple(given.foreground.shape))
    flipped = at_size ^ ~given.valid
    assert (flipped != at_size).any()
    first, second = (score_masks(values.float(), values, given).measures for values in (at_size, flipped))
    for one, other in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one, other)
    maps = soft.softmax(-1)
    full = given._replace(valid=torch.ones_like(given.valid))
    assert not torch.equal(mark_attention(maps, 0.6, given).curve, mark_attention(maps, 0.6, full).curve)


def test_objects_are_scored_one_by_one():
    instances = torch.zeros(2, 32, 32, dtype=torch.bool)
    instances[0, :16, :16], instances[1, 16:, 16:] = True, True
    given = annotation_from_mask(instances.any(0))._replace(instances=instances)
    maps = torch.full((2, 4, 4), 1e-6)
    maps[0, :2, :2], maps[1, 2:, 2:] = 1, 1  # each head sees one object
    objects = mark_attention(maps, 0.9, given).objects
    assert objects[:, :2].tolist() == [[1, 0], [0, 1]]
    assert objects[:, 2].tolist() == pytest.approx([0.5, 0.5])  # the mean map covers both


# --- boxes ---


@pytest.mark.parametrize("seed", range(4))
def test_boxes_surround_the_parts_largest_first(seed):
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(seed)) > 0.6
    parts = sorted(slow_components(mask.numpy()), key=len, reverse=True)
    boxes = component_boxes(mask).tolist()
    assert sorted(boxes) == sorted(slow_box(part) for part in parts)
    assert boxes[0] in [slow_box(part) for part in parts if len(part) == len(parts[0])]


@pytest.mark.parametrize("size", [(48, 64), (50, 61), (139, 200)])
def test_the_box_of_patches_is_that_of_their_pixels(size):
    mask = torch.zeros(7, 5, dtype=torch.bool)
    mask[2:5, 1:4], mask[0, 0] = True, True
    part = max(slow_components(upsample_mask(mask, size).numpy()), key=len)
    assert largest_box(mask, size).tolist() == slow_box(part)


def test_located_needs_half_of_any_box():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :2] = True
    size = (40, 40)
    assert corloc_hit(mask, torch.tensor([[30, 30, 40, 40], [0, 0, 20, 10]]), size)  # half of it
    assert not corloc_hit(mask, torch.tensor([[0, 0, 20, 9], [19, 19, 40, 40]]), size)
    assert not corloc_hit(torch.zeros(4, 4, dtype=torch.bool), torch.tensor([[0, 0, 40, 40]]), size)


def test_overlap_of_boxes_counts_pixels():
    boxes = [[0, 0, 4, 5], [2, 1, 6, 9], [4, 0, 5, 5], [0, 0, 1, 1]]
    for one in boxes:
        expected = [slow_box_iou(one, other) for other in boxes]
        assert box_iou(torch.tensor(one), torch.tensor(boxes)).tolist() == pytest.approx(expected)


# --- real masks ---


def test_known_values_on_ecssd(ecssd):
    """Of all 1,000 masks are known: whole image F .279; center prior F .524 and, at beta² .09, .513; acc .770."""
    truths = [np.asarray(Image.open(path)) > 0 for path in sorted((ecssd / "masks").glob("*.png"))]
    given = [annotation_from_mask(torch.from_numpy(truth)) for truth in truths]
    whole = stack_marks([score_masks(torch.ones(1, 2, 2), torch.ones(1, 2, 2).bool(), one) for one in given[::6]])
    shares = np.array([truth.mean() for truth in truths[::6]])
    assert whole.measures.iou[:, 0].numpy() == pytest.approx(shares)
    assert whole.measures.accuracy[:, 0].numpy() == pytest.approx(shares)
    assert whole.measures.f[:, 0].numpy() == pytest.approx(1.3 * shares / (0.3 * shares + 1))
    squashed = [resize_annotation(one) for one in given]
    prior, threshold = center_prior(torch.stack([one.object for one in squashed]))
    marks = stack_marks(mark_prior(squashed, threshold))
    assert torch.allclose(marks.measures.iou[:, 0], prior)
    assert marks.measures.accuracy.mean() == pytest.approx(0.770, abs=0.01)
    assert marks.measures.f.mean() == pytest.approx(0.524, abs=0.015)
    assert marks.located.float().mean() > 0.4  # objects are central


def test_the_same_mask_has_two_f(ecssd):
    truths = [
        downsample_mask(torch.from_numpy(np.asarray(Image.open(path)) > 0)) for path in (ecssd / "masks").glob("*.png")
    ]
    mask = torch.stack(truths).float().mean(0) >= 0.3
    counted = [pool_mask_to_patches(truth, (64, 64)) for truth in truths]
    values = {
        beta: torch.stack([f_beta((mask & t.object.bool()).sum(), mask.sum(), t.object.sum(), beta) for t in counted])
        for beta in (0.3, 0.09)
    }
    assert values[0.3].mean() == pytest.approx(0.524, abs=0.015)
    assert values[0.09].mean() == pytest.approx(0.513, abs=0.015)
    assert values[0.3].mean() - values[0.09].mean() == pytest.approx(0.011, abs=0.005)
    measured = saliency_scores(
        mask[None].float(), mask[None], counted[0], object_=truths[0], counted=torch.ones_like(truths[0])
    )
    assert measured.f[0] == pytest.approx(values[0.3][0].item())
