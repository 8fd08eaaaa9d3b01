"""Masks that follow the edges in a picture."""

import sys

import pytest
import torch

from ssl_vit.attention.masks import to_pixels
from ssl_vit.attention.metrics import count_truth
from ssl_vit.attention.refine import check_opencv, refine
from ssl_vit.attention.truth import MaskFolder
from ssl_vit.data.files import pictures_at
from ssl_vit.errors import UserError


def disc(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A dark disc on a bright, noisy ground, and where it is."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (rows - height * 0.45) ** 2 + (columns - width * 0.55) ** 2 < (0.3 * height) ** 2
    colours = torch.where(
        inside, torch.tensor([60, 40, 30])[:, None, None], torch.tensor([190, 200, 180])[:, None, None]
    )
    noise = torch.randint(-8, 9, (3, height, width), generator=torch.Generator().manual_seed(0))
    return (colours + noise).to(torch.uint8), inside


def overlap(mask: torch.Tensor, truth: torch.Tensor) -> float:
    return ((mask & truth).sum() / (mask | truth).sum()).item()


def majority(truth: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    counted = count_truth(truth, grid)
    return 2 * counted.object > counted.pixels


@pytest.mark.parametrize("channels", [3, 1])
def test_the_outline_moves_to_the_edge(channels):
    picture, inside = disc(120, 170)
    mask = majority(inside, (8, 11))
    refined = refine(mask, picture[:channels])
    assert refined.dtype == torch.bool
    assert overlap(to_pixels(mask, (120, 170)), inside) < 0.9
    assert overlap(refined, inside) > 0.97


@pytest.mark.parametrize("flip", [[-1], [-2]])
def test_a_mirrored_picture_has_the_mirrored_mask(flip):
    picture, inside = disc(96, 128)
    mask = majority(inside, (6, 8))
    assert torch.equal(refine(mask.flip(flip), picture.flip(flip)), refine(mask, picture).flip(flip))


@pytest.mark.parametrize(("grid", "size"), [((1, 1), (8, 8)), ((1, 4), (9, 65)), ((2, 3), (1, 2)), ((3, 2), (500, 10))])
def test_masks_of_all_or_no_patches_stay(grid, size):
    picture = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for value in (True, False):
        assert torch.equal(refine(torch.full(grid, value), picture), torch.full(size, value))


def test_real_objects_are_met_better(ecssd):
    pictures, truths = pictures_at(ecssd / "images"), MaskFolder(ecssd / "masks")
    gains = []
    for place in range(0, 40, 4):
        picture = pictures.read(place, 3)
        size = (picture.shape[-2], picture.shape[-1])
        truth = truths.read(pictures.name(place), size)
        mask = majority(truth, (size[0] // 16, size[1] // 16))
        gains.append(overlap(refine(mask, picture), truth) - overlap(to_pixels(mask, size), truth))
    assert sum(gains) / len(gains) > 0.03


def test_without_opencv_a_clear_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2.ximgproc", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-vit\[refine\]'"):
        check_opencv()
    with pytest.raises(UserError, match=r"pip install 'ssl-vit\[refine\]'"):
        refine(torch.ones(2, 2) > 0, torch.zeros(3, 8, 8, dtype=torch.uint8))
