"""Crops: torchvision's distribution of boxes, torchvision's pixels, and the same views however they are made."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import CropsConfig, ViewsConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import (
    Boxes,
    bicubic_weights,
    cached_bicubic_weights,
    resolve_boxes,
    scale_boxes,
)
from ssl_vit.runtime.rng import sample_keys, view_keys
from tests.helpers.crops import crop_image, sample_crop_boxes
from tests.reference.augmentations import kolmogorov_smirnov, photograph, textbook_views

KS_LIMIT = 1.95  # p = .001


def make_views(*words: str) -> ViewsConfig:
    return load_config("pretrain", ["data.root=.", "backbone=vit_cpu", *words], PretrainConfig).method.views


@pytest.fixture(scope="module")
def views() -> ViewsConfig:
    return make_views("method.views.local_crops.count=3", "method.views.local_crops.size=24")


def crops(scale: tuple[float, float], size: int = 32) -> CropsConfig:
    return CropsConfig(count=2, size=size, scale=scale, ratio=(3 / 4, 4 / 3))


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, torch.arange(count))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(375, 500, (0.4, 1.0)), (32, 32, (0.05, 0.4)), (50, 120, (0.3, 1.0))]
)
def test_sample_crop_boxes_is_distributed_like_torchvision(height, width, scale):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3]) for _ in range(4000)]).T
    ours = sample_crop_boxes(keys(4000), height, width, crops=crops(scale), flip=0.5)
    ratios = [box[3] / box[2] for box in (ours, theirs)]
    areas = [box[3] * box[2] for box in (ours, theirs)]
    centers = [box[1] + box[3] / 2 for box in (ours, theirs)]
    for a, b in [*zip(ours[:4], theirs, strict=True), ratios, areas, centers]:
        assert kolmogorov_smirnov(a, b) < KS_LIMIT


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (7, 9)])
def test_sample_crop_boxes_falls_back_to_torchvisions_central_box(height, width):
    """A share of area that no box of an allowed ratio has: all ten attempts fail."""
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), (1.9, 2.0), [3 / 4, 4 / 3])
    ours = sample_crop_boxes(keys(5), height, width, crops=crops((1.9, 2.0)), flip=0.5)
    assert torch.stack(ours[:4], dim=1).tolist() == [list(theirs)] * 5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (3, 2), (33, 20), (500, 375)])
def test_sample_crop_boxes_stays_inside_the_image(height, width):
    box = sample_crop_boxes(keys(2000), height, width, crops=crops((0.05, 1.0)), flip=0.5)
    assert (box.top >= 0).all() and (box.left >= 0).all() and (box.height >= 1).all() and (box.width >= 1).all()
    assert (box.top + box.height <= height).all() and (box.left + box.width <= width).all()


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_sample_crop_boxes_flips_with_its_probability(flip):
    share = sample_crop_boxes(keys(4000), 32, 32, crops=crops((0.4, 1.0)), flip=flip).flip.float().mean()
    assert share == pytest.approx(flip, abs=0.03 if flip == 0.5 else 0)


def test_bicubic_weights_give_torchvisions_pixels(photos: Path):
    """Against the 8-bit antialiased resize of real photographs: never more than one level apart."""
    torch.manual_seed(0)
    for file in sorted(photos.iterdir())[:12]:
        image = photograph(file)
        height, width = image.shape[1:]
        for size in (224, 48, 24):
            top, left = int(torch.randint(height // 3, ())), int(torch.randint(width // 3, ()))
            tall, wide = int(torch.randint(20, height - top, ())), int(torch.randint(20, width - left, ()))
            for flip in (False, True):
                theirs = tv.resized_crop(
                    image, top, left, tall, wide, [size, size], InterpolationMode.BICUBIC, antialias=True
                )
                start, length, flips = (
                    torch.tensor([[top], [left]]),
                    torch.tensor([[tall], [wide]]),
                    torch.tensor([flip]),
                )
                rows = bicubic_weights(start[0], length[0], torch.tensor([False]), source=height, size=size)
                cols = bicubic_weights(start[1], length[1], flips, source=width, size=size)
                ours = (rows @ (image.float() @ cols.mT).clamp(0, 255)).round().clamp(0, 255)
                distance = (ours - (theirs.flip(-1) if flip else theirs)).abs()
                assert distance.max() <= 1
                assert distance.mean() < 0.3


def test_crop_batch_equals_crop_image(views: ViewsConfig, photos: Path):
    dataset = torch.stack([tv.resize(photograph(file), [64, 80]) for file in sorted(photos.iterdir())[:8]])
    crop = MultiCrop(views)
    batch_global, batch_local = crop.crop_batch(dataset, keys(8))
    assert batch_global.shape == (8, 2, 3, 48, 48) and batch_local.shape == (8, 3, 3, 24, 24)
    assert batch_global.dtype == batch_local.dtype == torch.uint8
    for i, key in enumerate(keys(8)):
        one_global, one_local = crop_image(crop, dataset[i], key)
        assert (one_global.int() - batch_global[i].int()).abs().max() <= 1
        assert (one_local.int() - batch_local[i].int()).abs().max() <= 1


def test_crop_batch_depends_on_the_keys_only(views: ViewsConfig):
    dataset = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8)
    crop = MultiCrop(views)
    together = crop.crop_batch(dataset, keys(6))
    again = crop.crop_batch(dataset, keys(6))
    alone = crop.crop_batch(dataset[4:5], keys(6)[4:5])
    other = crop.crop_batch(dataset, keys(6, seed=1))
    for kind in range(2):
        assert torch.equal(together[kind], again[kind])
        assert (together[kind][4:5].int() - alone[kind].int()).abs().max() <= 1
        assert not torch.equal(together[kind], other[kind])


def test_crop_batch_gives_every_view_its_own_box(views: ViewsConfig):
    global_views, local_views = MultiCrop(views).crop_batch(
        torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8), keys(4)
    )
    assert not torch.equal(global_views[:, 0], global_views[:, 1])
    assert not torch.equal(local_views[:, 0], local_views[:, 1])


def test_multicrop_without_local_crops():
    crop = MultiCrop(make_views("method=sit"))
    assert crop.crop_batch(torch.zeros(4, 3, 40, 40, dtype=torch.uint8), keys(4))[1].shape == (4, 0, 3, 48, 48)
    assert crop_image(crop, torch.zeros(3, 40, 50, dtype=torch.uint8), keys(1)[0])[1].shape == (0, 3, 48, 48)


def test_multicrop_of_gray_images_keeps_one_channel(views: ViewsConfig):
    assert crop_image(MultiCrop(views), torch.zeros(1, 30, 50, dtype=torch.uint8), keys(1)[0])[0].shape == (
        2,
        1,
        48,
        48,
    )
    assert MultiCrop(views).crop_batch(torch.zeros(2, 1, 30, 50, dtype=torch.uint8), keys(2))[1].shape == (
        2,
        3,
        1,
        24,
        24,
    )


@pytest.mark.parametrize(
    ("height", "width", "scale", "sums"),
    [
        (263, 376, (0.4, 1.0), (2107700, 8120599, 28935321, 31062845, 65205)),
        (32, 32, (0.05, 0.4), (1095531, 1098688, 1847963, 1864036, 65205)),
        (10, 100, (0.3, 1.0), (0, 5385750, 1252500, 1628250, 65205)),
    ],
)
def test_sample_crop_boxes_equals_earlier_versions(height, width, scale, sums):
    """So that a run resumes with the views it would have seen."""
    boxes = sample_crop_boxes(keys(500), height, width, crops=crops(scale), flip=0.5)
    assert tuple(int((part.long() * torch.arange(1, 501)).sum()) for part in boxes) == sums


def test_crop_image_equals_torchvision_to_the_bit(views: ViewsConfig, photos: Path):
    crop = MultiCrop(views)
    kinds = (views.global_crops, 0), (views.local_crops, views.global_crops.count)
    for file, key in zip(sorted(photos.iterdir())[:10], keys(10), strict=True):
        image = photograph(file)
        for made, (kind, first) in zip(crop_image(crop, image, key), kinds, strict=True):
            boxes = sample_crop_boxes(view_keys(key, first, kind.count), *image.shape[1:], crops=kind, flip=views.flip)
            for view, *box, flip in zip(made, *(part.tolist() for part in boxes), strict=True):
                theirs = tv.resized_crop(image, *box, [kind.size] * 2, InterpolationMode.BICUBIC, antialias=True)
                assert torch.equal(view, tv.horizontal_flip(theirs) if flip else theirs)


def test_crop_batch_of_larger_images_equals_crop_image(views: ViewsConfig, photos: Path):
    dataset = torch.stack([tv.resize(photograph(file), [90, 110]) for file in sorted(photos.iterdir())[:6]])
    crop = MultiCrop(views)
    together = crop.crop_batch(dataset, keys(6))
    alone = [crop_image(crop, image, key) for image, key in zip(dataset, keys(6), strict=True)]
    for kind, made in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(kind, torch.stack(made))


def test_cached_bicubic_weights_equal_the_computed_ones():
    length, start = torch.meshgrid(torch.arange(1, 21), torch.arange(20), indexing="ij")
    fits = start + length <= 20
    stretch = start[fits], length[fits]
    for flip in (torch.zeros(210, dtype=torch.bool), torch.ones(210, dtype=torch.bool)):
        computed = bicubic_weights(*stretch, flip, source=20, size=7)
        assert torch.equal(cached_bicubic_weights(*stretch, flip, source=20, size=7), computed)


# --- images decoded smaller ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 5000), (95, 95), (150, 200), (263, 376), (768, 1024), (3000, 4001)])
def test_jpeg_scale_keeps_every_box_larger_than_its_view(views: ViewsConfig, height, width):
    crop = MultiCrop(views)
    draws = crop.sample_params(keys(60))
    sizes = torch.tensor(crop.sizes)
    answers = set()
    for place, boxes in enumerate(zip(*resolve_boxes(draws, height, width), strict=True)):
        by = crop.plan(draws, place).jpeg_scale(height, width)
        answers.add(by)
        small = scale_boxes(Boxes(*boxes), by)
        if by > 1:
            assert (small.height >= sizes).all() and (small.width >= sizes).all()
        if by < 8:
            assert (boxes[2] < 2 * by * sizes).any() or (boxes[3] < 2 * by * sizes).any()
    assert max(answers) == {40: 1, 95: 1, 150: 2, 263: 4, 768: 8, 3000: 8}[height]


@pytest.mark.parametrize("by", [2, 4, 8])
def test_scale_boxes_is_exact_to_half_a_pixel(by):
    whole = sample_crop_boxes(keys(2000), 301, 403, crops=crops((0.05, 1.0)), flip=0.5)
    small = scale_boxes(whole, by)
    for start, length, last in ((0, 2, -(-301 // by)), (1, 3, -(-403 // by))):
        edges = torch.stack([whole[start], whole[start] + whole[length]])
        moved = torch.stack([small[start], small[start] + small[length]])
        assert ((moved * by - edges).abs() <= by / 2).all()
        assert (moved >= 0).all() and (moved <= last).all()
    assert torch.equal(small.flip, whole.flip)


# --- on a GPU --------------------------------------------------------------------------------------------------


def test_crop_batch_matmul_reads_nothing_back_from_a_gpu(views: ViewsConfig):
    """On a pretended one, where reading a value is an error."""
    crop = MultiCrop(views)
    with FakeTensorMode():
        dataset = torch.empty(6, 3, 40, 50, dtype=torch.uint8, device="cuda")
        boxes = Boxes(*torch.ones(5, 6, len(crop.sizes), dtype=torch.int64, device="cuda"))
        made = crop.crop_batch_matmul(dataset, boxes)
        with pytest.raises(DataDependentOutputException):
            bool(boxes.flip.any())
    assert [tuple(kind.shape) for kind in made] == crop.view_shapes(6, 3)
    assert {kind.device.type for kind in made} == {"cuda"}


# --- the whole augmentation ------------------------------------------------------------------------------------


def test_crop_image_is_distributed_like_the_textbook_form(photos: Path):
    """Crops and photometric transforms together: the distribution of the views' brightness and contrast."""
    torch.manual_seed(0)
    random.seed(0)
    views = make_views("method.views.local_crops.size=48", "method.views.local_crops.count=4")
    crop, photometric = MultiCrop(views), ColorAugmentation(views)
    files = sorted(photos.iterdir())[::2]
    theirs = [textbook_views(file, views) for file in files]
    ours = [crop_image(crop, photograph(file), key) for file, key in zip(files, keys(len(files)), strict=True)]
    global_views, local_views = (torch.stack(kind) for kind in zip(*ours, strict=True))
    made = photometric(global_views, keys(len(files))), photometric(local_views, keys(len(files)), first_view=2)
    for kind, first, last in ((made[0], 0, 2), (made[1], 2, 6)):
        reference = torch.stack([torch.stack(each[first:last]) for each in theirs])
        assert kind.shape == reference.shape
        for statistic in (lambda x: x.mean(dim=(2, 3, 4)), lambda x: x.std(dim=(2, 3, 4))):
            assert kolmogorov_smirnov(statistic(kind), statistic(reference)) < KS_LIMIT
