"""Views of the first training step, with crop boxes, inputs and targets of a pretext task, and their figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from pydantic import ConfigDict
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes

from ssl_vit.config.methods import SelectedMethodConfig, ViewsConfig
from ssl_vit.config.pretrain import BackboneConfig, Source
from ssl_vit.config.types import AUTO_RANGE, Count, Seed, StrictConfig, ValueRangeField
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler
from ssl_vit.data.loading.loader import MultiCropDataset
from ssl_vit.data.transforms.color import ColorAugmentation
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.data.transforms.random_resized_crop import resolve_boxes, sample_crop_params
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import view_keys
from ssl_vit.runtime.yaml_file import read_yaml
from ssl_vit.visualization.image_grid import captioned, fit_size, image_grid, page, stack, text_image, to_pil

Box = tuple[int, int, int, int]  # top, left, height and width in pixels
# Of normalized global views (B, G, C, S, S) and keys (B,): target and input (G·B, C, S, S), view by view, the hidden
# pixels (G·B, 1, S, S) and the quarter turns clockwise (G·B,); None if the method's input are the views.
Pretext = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor] | None]

IMAGE, GLOBAL, LOCAL, PRETEXT = 210, 132, 62, 122  # pixels of a tile's longer side
LOCAL_COLUMNS = 5
# Of the views, in order: dark enough for white numbers, and as distinguishable with color blindness as ten can be.
COLORS = ("#0b62b0", "#c44e00", "#15794f", "#a3195b", "#6b4fbb", "#8a6100", "#00788a", "#b3261e", "#4d6b00", "#5b5b5b")


class PretextSample(NamedTuple):
    """Input and target of the model for one view; images are in [0, 1]."""

    target: Tensor  # (C, S, S), the rotated view
    corrupted: Tensor  # (C, S, S), the input
    hidden: Tensor  # (S, S) bool: pixels replaced by noise or another image
    quarter: int  # quarter turns clockwise


class FirstStepViews(NamedTuple):
    """One image and all its views in a step."""

    name: str
    image: Tensor  # (C, H, W) uint8
    boxes: list[Box]  # of the views, in pixels of the image
    views: list[Tensor]  # (C, S, S) float in [0, 1], cropped and color-augmented; the global views first
    pretext: list[PretextSample]  # one per global view, if the method has a pretext task


def load_first_step(
    settings: RunSettings, dataset: ImageDataset, pretext: Pretext, *, count: int, skipped: SkippedImageLog
) -> list[FirstStepViews]:
    """Load the first images of the first training step with their views, which derive from the same keys.

    They equal those of training up to one level of 255, where training crops images of one size in a batch. There are
    `count`, at most `data.batch_size`. Unreadable images are replaced by the next readable ones, as in training.

    Raises:
        UserError: No image can be read.
    """
    batch_size, seed = settings.data.batch_size, settings.seed
    sampler = ResumableBatchSampler(len(dataset), batch_size, seed=seed, rank=0, world=1, accumulate=1)
    views, channels = settings.method.views, settings.backbone.in_chans
    loader = MultiCropDataset(
        partial(dataset.read, channels=channels),
        dataset.labels,
        channels=channels,
        multicrop=MultiCrop(views),
        skipped=skipped,
    )
    batch = loader.__getitems__(next(iter(sampler))[: -(-count // 4) * 4])  # corruption exchanges blocks within fours
    if isinstance(batch, UserError):
        raise batch
    color = ColorAugmentation(views)
    global_views = color(batch.global_views, batch.key)  # (B, G, C, S, S)
    local_views = color(batch.local_views, batch.key, first_view=global_views.shape[1])  # (B, L, C, s, s)
    shown = [_denormalize(part, views) for part in (global_views, local_views)]
    samples = []  # view by view
    if (made := pretext(global_views, batch.key)) is not None:
        target, corrupted, hidden, quarter = made
        parts = _denormalize(target, views), _denormalize(corrupted, views), hidden[:, 0], quarter.tolist()
        samples = [PretextSample(*sample) for sample in zip(*parts, strict=True)]
    found = []
    for row, index in enumerate(batch.index.tolist()[:count]):
        image = dataset.read(index, channels)
        boxes = crop_boxes(batch.key[row], (image.shape[1], image.shape[2]), views)
        own_views = [view for part in shown for view in part[row]]
        found.append(FirstStepViews(dataset.name(index), image, boxes, own_views, samples[row :: len(batch.key)]))
    return found


def crop_boxes(key: Tensor, size: tuple[int, int], views: ViewsConfig) -> list[Box]:
    """Return the crop boxes of all views of the sample with a key () in an image of this height and width."""
    boxes: list[Box] = []
    for crops, first in ((views.global_crops, 0), (views.local_crops, views.global_crops.count)):
        params = sample_crop_params(view_keys(key, first, crops.count), crops=crops, flip=views.flip)
        boxes += zip(*(part.tolist() for part in resolve_boxes(params, *size)[:4]), strict=True)
    return boxes


def _denormalize(x: Tensor, views: ViewsConfig) -> Tensor:
    """Return normalized images (..., C, H, W) in [0, 1]."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (views.mean, views.std))
    return (x * std + mean).clamp(0, 1)


class RunDataConfig(StrictConfig):
    """Keys of the section `data`; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Source
    root: Path
    batch_size: Count
    range: ValueRangeField = AUTO_RANGE  # runs of earlier versions have none


class RunSettings(StrictConfig):
    """Keys of the configuration of a pretraining run of any version; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: Seed
    data: RunDataConfig
    backbone: BackboneConfig
    method: SelectedMethodConfig


def read_run_settings(run: Path) -> RunSettings:
    """Read the settings from `config.yaml` of a run directory.

    Raises:
        UserError: There is no configuration of a pretraining run, it is of version 0.1, or it is damaged.
    """
    path, values = run / "config.yaml", None
    try:
        values = read_yaml(path)
        return RunSettings.model_validate(values)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run directory") from None
    except ValueError:  # also of pydantic
        trainer = values.get("trainer") if isinstance(values, dict) else None
        if isinstance(trainer, dict) and "accumulate" in trainer:  # today accumulate_grad_batches
            raise UserError(f"{run} is a run of ssl-vit 0.1, whose settings this version cannot read") from None
        raise UserError(f"{path} is damaged, or not of a pretraining run") from None


def views_figure(examples: Sequence[FirstStepViews]) -> Image.Image:
    """Draw one row per image: the image with the boxes of its views, then the views.

    If the method has a pretext task, the columns are the view, its target, the model's input and the hidden pixels.
    The examples, one or more, are of one run.
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
