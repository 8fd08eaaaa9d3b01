"""Refinement of masks along the edges of an image."""

import sys

import pytest
import torch

from ssl_vit.data.annotations.object_masks import MaskFolder
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.evaluation.segmentation.guided_filter import import_opencv, refine
from ssl_vit.evaluation.segmentation.iou import pool_mask_to_patches
from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.runtime.errors import UserError


def disc(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a dark disc on a bright, noisy background, and its mask."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (rows - height * 0.45) ** 2 + (columns - width * 0.55) ** 2 < (0.3 * height) ** 2
    colors = torch.where(
        inside, torch.tensor([60, 40, 30])[:, None, None], torch.tensor([190, 200, 180])[:, None, None]
    )
    noise = torch.randint(-8, 9, (3, height, width), generator=torch.Generator().manual_seed(0))
    return (colors + noise).to(torch.uint8), inside


def overlap(mask: torch.Tensor, target: torch.Tensor) -> float:
    return ((mask & target).sum() / (mask | target).sum()).item()


def majority(target: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    counts = pool_mask_to_patches(target, grid)
    return 2 * counts.foreground > counts.valid


@pytest.mark.parametrize("channels", [3, 1])
def test_refine_moves_the_outline_to_the_edge(channels):
    image, inside = disc(120, 170)
    mask = majority(inside, (8, 11))
    refined = refine(mask, image[:channels])
    assert refined.dtype == torch.bool
    assert overlap(upsample_mask(mask, (120, 170)), inside) < 0.9
    assert overlap(refined, inside) > 0.97


@pytest.mark.parametrize("flip", [[-1], [-2]])
def test_refine_of_a_mirrored_image_is_mirrored(flip):
    image, inside = disc(96, 128)
    mask = majority(inside, (6, 8))
    assert torch.equal(refine(mask.flip(flip), image.flip(flip)), refine(mask, image).flip(flip))


@pytest.mark.parametrize(("grid", "size"), [((1, 1), (8, 8)), ((1, 4), (9, 65)), ((2, 3), (1, 2)), ((3, 2), (500, 10))])
def test_refine_keeps_full_and_empty_masks(grid, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for value in (True, False):
        assert torch.equal(refine(torch.full(grid, value), image), torch.full(size, value))


def test_refine_improves_the_iou_of_real_objects(ecssd):
    dataset, targets = load_images_at(ecssd / "images"), MaskFolder(ecssd / "masks")
    gains = []
    for index in range(0, 40, 4):
        image = dataset.read(index, 3)
        size = (image.shape[-2], image.shape[-1])
        target = targets.read(dataset.name(index), size)
        mask = majority(target, (size[0] // 16, size[1] // 16))
        gains.append(overlap(refine(mask, image), target) - overlap(upsample_mask(mask, size), target))
    assert sum(gains) / len(gains) > 0.03


def test_import_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2.ximgproc", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-vit\[refine\]'"):
        import_opencv()
    with pytest.raises(UserError, match=r"pip install 'ssl-vit\[refine\]'"):
        refine(torch.ones(2, 2) > 0, torch.zeros(3, 8, 8, dtype=torch.uint8))
