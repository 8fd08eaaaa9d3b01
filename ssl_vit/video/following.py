"""Objects followed through videos by a network and by baselines, scored frame by frame as DAVIS-2017 does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.pictures import BrokenPicture
from ssl_vit.data.video import Skip
from ssl_vit.errors import UserError
from ssl_vit.evaluation.tiles import as_image, fitted
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.video.boundary import Course, boundary_f, course, region
from ssl_vit.video.davis import VOID, Clip, Mask, default_palette, numbers_in, read_mask, write_mask
from ssl_vit.video.propagation import Propagation, Rule, nearest

TILES, TILE = 5, 240  # shown of a video, and the pixels of their longer sides


class Followed(NamedTuple):
    """What became of one video's objects."""

    name: str
    objects: list[int]  # their numbers in the first mask
    frames: int  # that could be read, the first included
    scored: int  # of these
    values: dict[str, Tensor]  # (2, objects, scored) by follower: J and F; empty without masks to score by
    tiles: list[Image.Image]

    def courses(self, follower: str) -> list[tuple[Course, Course]]:
        """J and F of each object."""
        return [(course(j), course(f)) for j, f in self.values[follower].unbind(1)]


def follow(
    clip: Clip,
    networks: dict[str, LoadedBackbone],
    rule: Rule,
    *,
    out: Path,
    still: str | None,
    skip: Skip,
    tick: Callable[[], object],
) -> Followed:
    """Carry the first frame's objects through a video, write a mask for each frame, and score those with a given mask.

    The first and the last frame are not scored; void pixels count neither way.

    Args:
        clip: The video.
        networks: By name; the first one's masks are written.
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
    mask = _first_mask(clip, first.name, first.picture)
    numbers = _numbers(mask, f"{clip.name}: the mask of the first frame, {first.name},")  # by class
    objects = numbers[1:].tolist()
    start = _classes(mask.numbers, numbers)
    carriers: dict[str, Callable[[Tensor], Tensor]] = {
        name: Propagation(network, rule, first.picture, start).step for name, network in networks.items()
    }
    if still:
        carriers[still] = lambda picture: nearest(start, (picture.shape[-2], picture.shape[-1]))
    colours = mask.palette or default_palette()
    shown = set(torch.linspace(0, (clip.frames.count or 1) - 1, TILES).round().long().tolist())
    tiles = [_tile(first.picture, start, numbers, colours)]
    _write(out, first.name, numbers[start], colours)
    values: dict[int, list[Tensor]] = {}  # place -> (2, objects) of each carrier
    place = 0
    tick()
    for place, frame in enumerate(frames, start=1):
        carried = [carry(frame.picture) for carry in carriers.values()]
        _write(out, frame.name, numbers[carried[0]], colours)
        if place in shown:
            tiles.append(_tile(frame.picture, carried[0], numbers, colours))
        truth = _truth(clip, frame.name, carried[0], binary=mask.binary, skip=skip)
        if truth is not None:
            values[place] = [_score(classes, truth, objects) for classes in carried]
        tick()
    values.pop(place, None)  # the last frame's
    stacked = [torch.stack(of_carrier, dim=-1) for of_carrier in zip(*values.values(), strict=True)]
    by_name = dict(zip(carriers, stacked, strict=True)) if stacked else {}
    return Followed(clip.name, objects, place + 1, len(values), by_name, tiles)


def _first_mask(clip: Clip, name: str, picture: Tensor) -> Mask:
    path = clip.masks.path(name, first=True)
    if path is None:
        raise UserError(
            f"{clip.name}: there is no mask with the name of the first frame, {name}, in {clip.masks.place}"
        )
    try:
        mask = read_mask(path)
    except BrokenPicture as broken:
        raise UserError(f"{path}: {broken.reason}") from None
    if mask.numbers.shape != picture.shape[-2:]:
        raise UserError(f"{path} has {_size(mask.numbers)} pixels, its frame {_size(picture)}")
    return mask


def _numbers(mask: Mask, called: str) -> Tensor:
    """The number of each class: 0, which is background, then those of the objects."""
    objects = [number for number in numbers_in(mask.numbers) if number not in (0, VOID)]
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
    path = clip.masks.path(name, first=False)
    if path is None:
        return None
    try:
        numbers = read_mask(path, binary=binary).numbers
        if numbers.shape != like.shape:
            raise BrokenPicture(path.name, f"the mask has {_size(numbers)} pixels, its frame {_size(like)}")
    except BrokenPicture as broken:
        skip(BrokenPicture(path.name, broken.reason))
        return None
    return numbers


def _score(classes: Tensor, truth: Tensor, objects: list[int]) -> Tensor:
    """J and F (2, objects) of one frame's classes (H, W) by its given numbers (H, W)."""
    counted = truth != VOID
    masks = torch.stack([(classes == place) & counted for place in range(1, len(objects) + 1)])
    truths = torch.stack([truth == number for number in objects])
    return torch.stack([region(masks, truths), boundary_f(masks, truths)])


def _write(out: Path, name: str, numbers: Tensor, palette: list[int]) -> None:
    stem = f"{int(name):06d}" if name.isdecimal() else PurePosixPath(name).with_suffix("").as_posix()
    write_mask(out / f"{stem}.png", numbers, palette)


def _tile(picture: Tensor, classes: Tensor, numbers: Tensor, palette: list[int]) -> Image.Image:
    """The frame with each object in its colour."""
    size = fitted(picture, TILE)
    image = as_image(picture, size)
    small = nearest(classes, size)
    colours = torch.tensor(palette).view(-1, 3)[numbers[small]].to(torch.uint8)
    blended = Image.blend(image, Image.fromarray(colours.numpy()), 0.6)
    inside = Image.fromarray((small > 0).numpy()).convert("L")
    return Image.composite(blended, image.point(lambda value: value * 3 // 4), inside)


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]} x {pixels.shape[-2]}"
