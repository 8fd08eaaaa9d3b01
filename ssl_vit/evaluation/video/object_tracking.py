"""Objects followed through videos by a model and by baselines, scored frame by frame as DAVIS-2017 does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.annotations.davis import Clip, Mask, default_palette, object_ids, read_mask, write_mask
from ssl_vit.data.annotations.object_masks import VOID
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.video_frames import Skip
from ssl_vit.evaluation.video.davis_metrics import SequenceStats, boundary_accuracy, region_similarity, sequence_stats
from ssl_vit.evaluation.video.label_propagation import LabelPropagator, PropagationConfig, nearest
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import as_image, fitted

TILES, TILE = 5, 240  # shown of a video, and the pixels of their longer sides


class TrackingResult(NamedTuple):
    """What became of one video's objects."""

    name: str
    objects: list[int]  # their numbers in the first mask
    frames: int  # that could be read, the first included
    scored: int  # of these
    values: dict[str, Tensor]  # (2, objects, scored) by follower: J and F; empty without masks to score by
    tiles: list[Image.Image]

    def courses(self, follower: str) -> list[tuple[SequenceStats, SequenceStats]]:
        """J and F of each object."""
        return [(sequence_stats(j), sequence_stats(f)) for j, f in self.values[follower].unbind(1)]


def track_objects(
    clip: Clip,
    models: dict[str, LoadedBackbone],
    rule: PropagationConfig,
    *,
    out: Path,
    still: str | None,
    skip: Skip,
    tick: Callable[[], object],
) -> TrackingResult:
    """Carry the first frame's objects through a video, write a mask for each frame, and score those with a given mask.

    The first and the last frame are not scored; void pixels count neither way.

    Args:
        clip: The video.
        models: By name; the first one's masks are written.
        rule: How labels travel.
        out: Folder for the masks, which carry the frames' names.
        still: Name of the baseline that keeps the first mask; None: without it.
        skip: Is told every frame and every mask that cannot be used.
        tick: Is called after every frame.

    Raises:
        UserError: There is no frame, or no usable mask of the first one, or no object in it.
    """
    frames = clip.frames.read(skip)
    first = next(frames, None)
    if first is None:
        raise UserError(f"{clip.name}: no frame of this video can be read")
    mask = _first_mask(clip, first.name, first.image)
    numbers = _numbers(mask, f"{clip.name}: the mask of the first frame, {first.name},")  # by class
    objects = numbers[1:].tolist()
    start = _classes(mask.ids, numbers)
    carriers: dict[str, Callable[[Tensor], Tensor]] = {
        name: LabelPropagator(model, rule, first.image, start).step for name, model in models.items()
    }
    if still:
        carriers[still] = lambda picture: nearest(start, (picture.shape[-2], picture.shape[-1]))
    colors = mask.palette or default_palette()
    shown = set(torch.linspace(0, (clip.frames.count or 1) - 1, TILES).round().long().tolist())
    tiles = [_tile(first.image, start, numbers, colors)]
    _write(out, first.name, numbers[start], colors)
    values: dict[int, list[Tensor]] = {}  # place -> (2, objects) of each carrier
    place = 0
    tick()
    for place, frame in enumerate(frames, start=1):
        carried = [carry(frame.image) for carry in carriers.values()]
        _write(out, frame.name, numbers[carried[0]], colors)
        if place in shown:
            tiles.append(_tile(frame.image, carried[0], numbers, colors))
        truth = _truth(clip, frame.name, carried[0], binary=mask.binary, skip=skip)
        if truth is not None:
            values[place] = [_score(classes, truth, objects) for classes in carried]
        tick()
    values.pop(place, None)  # the last frame's
    stacked = [torch.stack(of_carrier, dim=-1) for of_carrier in zip(*values.values(), strict=True)]
    by_name = dict(zip(carriers, stacked, strict=True)) if stacked else {}
    return TrackingResult(clip.name, objects, place + 1, len(values), by_name, tiles)


def _first_mask(clip: Clip, name: str, picture: Tensor) -> Mask:
    path = clip.masks.find(name, first=True)
    if path is None:
        raise UserError(f"{clip.name}: there is no mask with the name of the first frame, {name}, in {clip.masks.path}")
    try:
        mask = read_mask(path)
    except UnreadableImageError as broken:
        raise UserError(f"{path}: {broken.reason}") from None
    if mask.ids.shape != picture.shape[-2:]:
        raise UserError(f"{path} has {_size(mask.ids)} pixels, its frame {_size(picture)}")
    return mask


def _numbers(mask: Mask, called: str) -> Tensor:
    """The number of each class: 0, which is background, then those of the objects."""
    objects = [number for number in object_ids(mask.ids) if number not in (0, VOID)]
    if not objects:
        raise UserError(f"{called} holds no object")
    return torch.tensor([0, *objects])


def _classes(numbers: Tensor, of_class: Tensor) -> Tensor:
    """Classes (H, W) of the numbers (H, W); void is background."""
    table = torch.zeros(VOID + 1, dtype=torch.int64)
    table[of_class] = torch.arange(len(of_class))
    return table[numbers]


def _truth(clip: Clip, name: str, like: Tensor, *, binary: bool, skip: Skip) -> Tensor | None:
    """The given numbers (H, W) of a later frame, if there is a mask that fits."""
    path = clip.masks.find(name, first=False)
    if path is None:
        return None
    try:
        numbers = read_mask(path, binary=binary).ids
        if numbers.shape != like.shape:
            raise UnreadableImageError(path.name, f"the mask has {_size(numbers)} pixels, its frame {_size(like)}")
    except UnreadableImageError as broken:
        skip(UnreadableImageError(path.name, broken.reason))
        return None
    return numbers


def _score(classes: Tensor, truth: Tensor, objects: list[int]) -> Tensor:
    """J and F (2, objects) of one frame's classes (H, W) by its given numbers (H, W)."""
    counted = truth != VOID
    masks = torch.stack([(classes == place) & counted for place in range(1, len(objects) + 1)])
    truths = torch.stack([truth == number for number in objects])
    return torch.stack([region_similarity(masks, truths), boundary_accuracy(masks, truths)])


def _write(out: Path, name: str, numbers: Tensor, palette: list[int]) -> None:
    stem = f"{int(name):06d}" if name.isdecimal() else PurePosixPath(name).with_suffix("").as_posix()
    write_mask(out / f"{stem}.png", numbers, palette)


def _tile(picture: Tensor, classes: Tensor, numbers: Tensor, palette: list[int]) -> Image.Image:
    """The frame with each object in its color."""
    size = fitted(picture, TILE)
    image = as_image(picture, size)
    small = nearest(classes, size)
    colors = torch.tensor(palette).view(-1, 3)[numbers[small]].to(torch.uint8)
    blended = Image.blend(image, Image.fromarray(colors.numpy()), 0.6)
    inside = Image.fromarray((small > 0).numpy()).convert("L")
    return Image.composite(blended, image.point(lambda value: value * 3 // 4), inside)


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]} x {pixels.shape[-2]}"
