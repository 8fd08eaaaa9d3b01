"""Figure of the views of images: where they are cropped from the image, and what the model is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes

from ssl_vit.visualization.first_step_views import FirstStepViews
from ssl_vit.visualization.image_grid import captioned, fit_size, image_grid, page, stack, text_image, to_pil

IMAGE, GLOBAL, LOCAL, PRETEXT = 210, 132, 62, 122  # pixels of a tile's longer side
LOCAL_COLUMNS = 5
# Of the views, in order: dark enough for white numbers, and as distinguishable with color blindness as ten can be.
COLORS = ("#0b62b0", "#c44e00", "#15794f", "#a3195b", "#6b4fbb", "#8a6100", "#00788a", "#b3261e", "#4d6b00", "#5b5b5b")


def views_figure(examples: Sequence[FirstStepViews]) -> Image.Image:
    """Draw one row per image: the image with the boxes of its views, then the views.

    If the method has a pretext task, the columns are the view, its target, the model's input and the hidden pixels.

    Args:
        examples: Of one run; at least one image.
    """
    first = examples[0]
    lines = ["The box with a view's number and color is where the view was cropped; a view may be flipped."]
    if first.pretext:
        titles = ["image", "view", "rotated: target", "corrupted: input", "hidden pixels"]
        rows = [[_draw_image(example), *_draw_pretext(example)] for example in examples]
        lines.append("The method rotates each view and hides parts of it; the model has to restore the target.")
    else:
        sizes = [view.shape[-1] for view in first.views]
        titles = ["image", f"global views, {sizes[0]} px"]
        titles += [f"local views, {sizes[-1]} px"] if len(first.views) > 2 else []
        rows = [[_draw_image(example), *_draw_views(example)] for example in examples]
        lines.append("Tiles show the input of the model: cropped, resized, with augmented colors.")
    return page([image_grid(rows, column_titles=titles, title_size=14), text_image(lines)])


def _draw_image(example: FirstStepViews) -> Image.Image:
    """Draw the image with the numbered boxes of its views, those of global views on top."""
    height, width = example.image.shape[-2:]
    size = fit_size(example.image, IMAGE)
    scale = torch.tensor([size[1] / width, size[0] / height] * 2)
    boxes = torch.tensor([[left, top, left + w, top + h] for top, left, h, w in example.boxes]) * scale
    boxes = boxes.round() - torch.tensor([0, 0, 1, 1])
    numbers = list(range(len(boxes)))[::-1]
    image = _draw_boxes(to_pil(example.image, size), boxes.flip(0), numbers)
    return captioned(image, [example.name, f"{width} x {height} px"], max_width=IMAGE)


def _draw_views(example: FirstStepViews) -> list[Image.Image]:
    tiles = [_draw_view(view, number, LOCAL if number > 1 else GLOBAL) for number, view in enumerate(example.views)]
    columns = [stack(tiles[:2], horizontal=True)]
    if local := tiles[2:]:
        columns.append(image_grid([local[i : i + LOCAL_COLUMNS] for i in range(0, len(local), LOCAL_COLUMNS)]))
    return columns


def _draw_pretext(example: FirstStepViews) -> list[Image.Image]:
    """Draw the columns view, target, input and hidden pixels, with a tile per view."""
    columns: list[list[Image.Image]] = [[], [], [], []]
    for number, (view, sample) in enumerate(zip(example.views, example.pretext, strict=True)):
        hidden = sample.hidden.float()[None]
        captions = "", f"by {90 * sample.quarter}°", "", f"{hidden.mean():.0%}"
        for column, tile, text in zip(columns, (view, sample.target, sample.corrupted, hidden), captions, strict=True):
            column.append(captioned(_draw_view(tile, number, PRETEXT), [text]))
    return [stack(column, gap=4) for column in columns]


def _draw_view(view: Tensor, number: int, side: int) -> Image.Image:
    """Draw a view (C, S, S) in [0, 1] as a square tile in a frame of its color, with its number."""
    box = torch.tensor([[0, 0, side - 1, side - 1]])
    return _draw_boxes(to_pil(view, (side, side)), box, [number])


def _draw_boxes(image: Image.Image, boxes: Tensor, numbers: Sequence[int]) -> Image.Image:
    """Draw boxes (n, 4), left, top, right and bottom, with the numbers of the views counted from 1."""
    labels, colors = [str(number + 1) for number in numbers], [COLORS[number % len(COLORS)] for number in numbers]
    pixels = pil_to_tensor(image)
    return to_pil(draw_bounding_boxes(pixels, boxes, labels, colors, width=2, fill_labels=True, label_colors="white"))
