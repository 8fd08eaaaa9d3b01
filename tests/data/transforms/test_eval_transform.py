"""The evaluation's crop: torchvision's pixels, one size from any size, and nothing done where nothing is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from ssl_vit.data.transforms.eval_transform import EvalTransform
from tests.reference.augmentations import photograph

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_eval_transform_is_resize_256_and_crop_224(photos: Path):
    textbook = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    transform = EvalTransform(224, 0.875, MEAN, STD)
    for file in sorted(photos.iterdir())[:8]:
        image = photograph(file)
        assert torch.equal(transform(image), textbook(image))


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (32, 32), (33, 31), (32, 500), (700, 40)])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_eval_transform_brings_any_size_to_one_size(shape, crop_ratio):
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    crop = EvalTransform(32, crop_ratio, MEAN, STD)(image)
    assert crop.dtype == torch.uint8
    assert torch.equal(crop, torch.full((3, 32, 32), 77, dtype=torch.uint8))


def test_eval_transform_keeps_images_of_the_right_size():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert EvalTransform(32, 0.875, MEAN, STD)(image) is image


def test_eval_transform_crops_the_center():
    image = torch.arange(40, dtype=torch.uint8).expand(1, 40, 40)
    crop = EvalTransform(32, 0.8, [0.0], [1.0])(image)
    assert crop[0, 0].tolist() == list(range(4, 36))


def test_normalize_uses_mean_and_std():
    batch = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    before = batch.clone()
    expected = v2.functional.normalize(batch / 255, MEAN, STD)
    torch.testing.assert_close(EvalTransform(8, 1.0, MEAN, STD).normalize(batch), expected)
    assert torch.equal(batch, before)


def test_describe_has_all_settings():
    record = EvalTransform(48, 0.875, MEAN, STD).describe()
    assert json.loads(json.dumps(record)) == record
    assert record["image_size"] == 48 and record["crop_ratio"] == 0.875 and record["mean"] == MEAN
