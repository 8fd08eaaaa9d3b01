"""IoU of attention masks: patch counts against pixels, rules of choosing a head, baselines on ECSSD."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.annotations.object_masks import MaskFolder, MissingMaskError, annotation_from_mask
from ssl_vit.evaluation.segmentation.iou import (
    center_prior,
    cross_validated_iou,
    downsample_mask,
    iou,
    majority_patches,
    pool_mask_to_patches,
)
from ssl_vit.evaluation.segmentation.mask_scores import score_attention
from ssl_vit.models.attention_maps import attention_mass_mask, topk_mask, upsample_mask
from ssl_vit.runtime.errors import UserError


def blob(height: int, width: int, seed: int) -> torch.Tensor:
    """Make a random foreground mask with a rough border."""
    noise = torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0, 0] > 0.55


def slow_iou(mask: torch.Tensor, target: torch.Tensor) -> float:
    pairs = list(zip(mask.flatten().tolist(), target.flatten().tolist(), strict=True))
    return sum(a and b for a, b in pairs) / sum(a or b for a, b in pairs)


@pytest.mark.parametrize(("size", "grid"), [((48, 64), (3, 4)), ((50, 61), (3, 4)), ((139, 200), (9, 12))])
def test_iou_of_patch_counts_is_that_of_pixels(size, grid):
    target = blob(*size, seed=0)
    masks = torch.rand(3, *grid, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = [slow_iou(mask, target) for mask in upsample_mask(masks, size)]
    assert iou(masks, pool_mask_to_patches(target, grid)).tolist() == pytest.approx(expected, abs=1e-12)


def test_iou_of_perfect_and_disjoint_masks():
    target = torch.zeros(8, 8, dtype=torch.bool)
    target[:4, :4] = True
    counts = pool_mask_to_patches(target, (2, 2))
    masks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 1]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]) > 0
    assert iou(masks, counts).tolist() == [1, 0, 0.5, 0]
    assert iou(majority_patches(counts), counts) == 1
    assert iou(torch.ones(counts.foreground.shape, dtype=torch.bool), counts) == 0.25


def test_score_attention_has_each_rule_for_each_head_and_the_mean_map():
    target = blob(60, 80, seed=3)
    maps = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(2))
    maps /= maps.sum((-2, -1), keepdim=True)
    scores = score_attention(maps, 0.6, annotation_from_mask(target)).ious
    area = round(48 * target.float().mean().item())
    for head in range(4):
        assert scores["mass"][head] == pytest.approx(
            slow_iou(upsample_mask(attention_mass_mask(maps[head], 0.6), (60, 80)), target)
        )
        assert scores["area"][head] == pytest.approx(
            slow_iou(upsample_mask(topk_mask(maps[head], area), (60, 80)), target)
        )
    assert scores["mass"][4] == pytest.approx(
        slow_iou(upsample_mask(attention_mass_mask(maps.mean(0), 0.6), (60, 80)), target)
    )


def test_score_attention_gives_a_tiny_object_one_patch():
    target = torch.zeros(64, 64, dtype=torch.bool)
    target[3, 3] = True
    maps = torch.eye(4)[None] + 0.1
    scores = score_attention(maps, 0.6, annotation_from_mask(target)).ious
    assert scores["area"][0] == pytest.approx(1 / 256)


def test_cross_validated_iou_of_random_heads_is_below_the_best():
    heads = torch.rand(41, 6, generator=torch.Generator().manual_seed(0))
    fixed, _ = cross_validated_iou(heads, seed=0)
    assert fixed.mean() < heads.mean(0).max()  # random heads: choosing on the scored images would be too high


def test_cross_validated_iou_is_scored_on_the_other_half():
    heads = torch.full((10, 3), 0.2)
    heads[:, 1] = 0.7
    fixed, chosen = cross_validated_iou(heads, seed=3)
    assert chosen == [1, 1]
    assert fixed.tolist() == pytest.approx([0.7] * 10)
    # One head is best on each half: each half must get the head that the other half chose.
    for seed in range(5):
        first = torch.zeros(10, dtype=torch.bool)
        first[torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:5]] = True
        split = torch.stack([first.float(), (~first).float()], dim=1)
        fixed, chosen = cross_validated_iou(split, seed=seed)
        assert chosen == [0, 1]
        assert fixed.sum() == 0


def test_center_prior_excludes_the_scored_image():
    left = torch.zeros(64, 64, dtype=torch.bool)
    left[:, :32] = True
    masks = torch.stack([left, left, left, ~left])
    scores, _ = center_prior(masks)
    assert scores.tolist() == pytest.approx([1, 1, 1, 0])


def test_baselines_on_ecssd_have_known_values(ecssd):
    """All 1,000 images give .408 (center prior), .235 (all foreground), .851 (ceiling at patch 16)."""
    targets = [torch.from_numpy(np.asarray(Image.open(path)) > 0) for path in sorted((ecssd / "masks").glob("*.png"))]
    assert len(targets) == 300
    prior, threshold = center_prior(torch.stack([downsample_mask(target) for target in targets]))
    assert prior.mean() == pytest.approx(0.41, abs=0.01)
    assert threshold == pytest.approx(0.3)
    counts = [
        pool_mask_to_patches(target, (round(target.shape[0] / 16), round(target.shape[1] / 16))) for target in targets
    ]
    assert torch.stack([iou(majority_patches(c), c) for c in counts]).mean() == pytest.approx(0.85, abs=0.01)
    whole = [iou(torch.ones(c.foreground.shape, dtype=torch.bool), c) for c in counts]
    assert torch.stack(whole).mean() == pytest.approx(0.235, abs=0.005)


def test_mask_folder_reads_every_image_mode(tmp_path):
    target = np.zeros((6, 9), dtype=np.uint8)
    target[1:4, 2:7] = 1
    palette = Image.fromarray(target, "P")
    palette.putpalette([0, 0, 200, 200, 0, 0])  # without black the index counts, not its color
    (tmp_path / "deep").mkdir()
    palette.save(tmp_path / "deep" / "palette.png")
    Image.fromarray(target).save(tmp_path / "dark.png")
    Image.fromarray(target.astype(bool)).save(tmp_path / "bit.tif")
    Image.fromarray(target.astype(np.uint16) * 300).save(tmp_path / "sixteen.png")
    rgba = np.dstack([target * 0, target * 9, target * 0, np.full_like(target, 255)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    folder = MaskFolder(tmp_path)
    for name in ("deep/palette.jpg", "dark.jpeg", "bit.png", "sixteen.webp", "rgba.png"):
        assert np.array_equal(folder.read(name, (6, 9)).numpy(), target > 0), name


def test_mask_folder_explains_unusable_masks(tmp_path):
    Image.new("L", (9, 6)).save(tmp_path / "empty.png")
    Image.new("L", (9, 6), 255).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    folder = MaskFolder(tmp_path)
    for name, reason in {
        "empty.jpg": "no object",
        "missing.jpg": "no mask with this image's name",
        "broken.jpg": "cannot be read",
    }.items():
        with pytest.raises(MissingMaskError, match=reason):
            folder.read(name, (6, 9))
    with pytest.raises(MissingMaskError, match=r"9 x 6 pixels, its image 20 x 12"):
        folder.read("small.jpg", (12, 20))
    with pytest.raises(UserError, match="no such folder"):
        MaskFolder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no image in this folder"):
        MaskFolder(tmp_path / "bare")
