"""Masks: the mass rule against a slow loop, and the way from patches to pixels."""

import pytest
import torch

from ssl_vit.models.attention_maps import attention_mass_mask, patch_of_pixel, topk_mask, upsample_mask


def slow_mass_mask(values: list[float], mass: float) -> list[bool]:
    """Take the largest value again and again until the mass is reached."""
    left = dict(enumerate(values))
    taken = set()
    while sum(values[i] for i in taken) < mass * sum(values):
        best = max(left, key=left.get)
        del left[best]
        taken.add(best)
    return [i in taken for i in range(len(values))]


@pytest.mark.parametrize("mass", [0.05, 0.37, 0.6, 0.95])
def test_attention_mass_mask_equals_the_slow_loop(mass):
    maps = torch.rand(20, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    for map_, mask in zip(maps, attention_mass_mask(maps, mass), strict=True):
        assert mask.flatten().tolist() == slow_mass_mask(map_.flatten().tolist(), mass)


def test_attention_mass_mask_has_the_fewest_patches():
    maps = torch.rand(50, 6, 5, generator=torch.Generator().manual_seed(1)).double()
    maps /= maps.sum((-2, -1), keepdim=True)
    masks = attention_mass_mask(maps, 0.6)
    held = (maps * masks).sum((-2, -1))
    smallest = torch.where(masks, maps, 2).amin((-2, -1))
    assert (held >= 0.6).all()
    assert (held - smallest < 0.6).all()


def test_attention_mass_mask_of_a_single_attended_patch():
    one = torch.zeros(2, 3)
    one[1, 2] = 5
    assert attention_mass_mask(one, 0.6).nonzero().tolist() == [[1, 2]]


def test_topk_mask_selects_the_largest():
    maps = torch.rand(3, 4, 5)
    for count in (1, 7, 20):
        masks = topk_mask(maps, count)
        assert masks.sum((-2, -1)).tolist() == [count] * 3
        assert (torch.where(masks, maps, 2).amin((-2, -1)) >= torch.where(masks, -1, maps).amax((-2, -1))).all()
    assert topk_mask(torch.ones(2, 2), 3).sum() == 3


@pytest.mark.parametrize(("pixels", "patches"), [(32, 4), (33, 4), (139, 9), (400, 25), (7, 7), (300, 19)])
def test_patch_of_pixel_is_the_nearest_center(pixels, patches):
    centers = (torch.arange(patches) + 0.5) * pixels / patches
    distance = (torch.arange(pixels)[:, None] + 0.5 - centers).abs()
    chosen = distance.gather(1, patch_of_pixel(pixels, patches)[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distance.amin(1))
    assert patch_of_pixel(pixels, patches).unique().numel() == patches


def test_upsample_mask_repeats_patches():
    masks = torch.rand(2, 3, 4) > 0.5
    large = upsample_mask(masks, (6, 12))
    assert torch.equal(large, masks.repeat_interleave(2, 1).repeat_interleave(3, 2))
