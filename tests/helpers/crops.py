"""Crop the views of one image, as a loading process does, and sample crop boxes."""

import torch
from torch import Tensor

from ssl_vit.config.methods import CropsConfig
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import Boxes, resolve_boxes, sample_crop_params


def crop_image(multicrop: MultiCrop, image: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the global views (G, C, S, S) and local views (L, C, s, s) of an image (C, H, W), all uint8."""
    global_views, local_views = (torch.empty(s[1:], dtype=torch.uint8) for s in multicrop.view_shapes(1, len(image)))
    multicrop.plan(multicrop.sample_params(key[None]), 0).crop_into(image, [*global_views, *local_views])
    return global_views, local_views


def sample_crop_boxes(keys: Tensor, height: int, width: int, *, crops: CropsConfig, flip: float) -> Boxes:
    """Sample one box and flip per key in an image of this height and width."""
    return resolve_boxes(sample_crop_params(keys, crops=crops, flip=flip), height, width)
