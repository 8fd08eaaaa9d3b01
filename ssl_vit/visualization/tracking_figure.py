"""Frames of videos with the tracked objects in their colors, one row per video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.visualization.image_grid import fit_size, image_grid, page, text_image, to_pil

FRAMES_PER_VIDEO = 5
TILE_SIDE = 240  # pixels of a tile's longer side


def draw_objects(frame: Tensor, numbers: Tensor, palette: Sequence[int]) -> Image.Image:
    """Draw a tile of a frame with each object in its color and a darker background.

    Args:
        frame: (C, H, W) uint8.
        numbers: (H, W) int64 in [0, 255]: the object of each pixel, 0 is background.
        palette: 256 colors as 768 values, red, green and blue of each number.
    """
    size = fit_size(frame, TILE_SIDE)
    image, small = to_pil(frame, size), upsample_mask(numbers, size)
    colors = torch.tensor(palette).view(-1, 3)[small].to(torch.uint8)
    colored = Image.blend(image, Image.fromarray(colors.numpy()), 0.6)
    foreground = Image.fromarray((small > 0).numpy()).convert("L")
    return Image.composite(colored, image.point(lambda value: value * 3 // 4), foreground)


def tracking_figure(videos: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Arrange the tiles of each video, by its name, in a row."""
    return page([image_grid([[text_image([name], max_width=110), *tiles] for name, tiles in videos.items()], gap=6)])
