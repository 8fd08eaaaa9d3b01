"""Track the objects of videos with a model and baselines, and score each frame as DAVIS-2017 does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.data.annotations.davis import Clip, Mask, default_palette, object_ids, read_mask
from ssl_vit.data.annotations.mask_pixels import VOID
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.video_frames import Skip
from ssl_vit.evaluation.video.davis_metrics import boundary_accuracy, region_similarity
from ssl_vit.evaluation.video.label_propagation import LabelPropagator, PropagationConfig
from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError


class TrackedFrame(NamedTuple):
    """A frame with the objects that the first model finds in it."""

    number: int  # among the readable frames, from 0
    name: str
    image: Tensor  # (3, H, W) uint8
    ids: Tensor  # (H, W) int64: object IDs, 0 is background
    palette: list[int]  # 256 x RGB


_RIM = 0.7  # least share of the border that an object covers which may be the background


class TrackingResult(NamedTuple):
    """Scores of one video's objects."""

    name: str
    objects: list[int]  # their IDs in the first mask
    frames: int  # that could be read, the first included
    scored: int  # of these
    values: dict[str, Tensor]  # (2, objects, scored) by tracker: J and F; empty without masks to score by
    remarks: list[str]  # what a reader of the scores must know of the masks


def track_objects(
    clip: Clip,
    models: dict[str, LoadedBackbone],
    config: PropagationConfig,
    *,
    still: str | None,
    skip: Skip,
    on_frame: Callable[[TrackedFrame], object],
) -> TrackingResult:
    """Propagate the objects of the first frame through a video, and score the frames that have a mask.

    The first and the last frame are not scored; void pixels are ignored. `still` names the baseline that keeps the
    first mask, if any. `skip` is called with every frame and every mask that cannot be used, `on_frame` with every
    frame, the first included, and the objects that the first model finds in it.

    Raises:
        UserError: There is no frame, or no usable mask of the first one, or no object in it; or no later mask has one
            of its objects.
    """
    frames = clip.frames.read(skip)
    first = next(frames, None)
    if first is None:
        raise UserError(f"{clip.name}: no frame of this video can be read")
    mask = _first_mask(clip, first.name, first.image)
    objects = [number for number in object_ids(mask.ids) if number not in (0, VOID)]
    if not objects:
        raise UserError(f"{clip.name}: the mask of the first frame, {first.name}, contains no object")
    ids = torch.tensor([0, *objects])  # of each class; class 0 is background, void pixels too
    class_of_id = torch.zeros(VOID + 1, dtype=torch.int64)
    class_of_id[ids] = torch.arange(len(ids))
    start = class_of_id[mask.ids]  # (H, W)
    trackers: dict[str, Callable[[Tensor], Tensor]] = {
        name: LabelPropagator(model, config, first.image, start).step for name, model in models.items()
    }
    if still:
        trackers[still] = lambda image: upsample_mask(start, (image.shape[-2], image.shape[-1]))
    palette = mask.palette or default_palette()
    on_frame(TrackedFrame(0, first.name, first.image, ids[start], palette))
    values: dict[int, list[Tensor]] = {}  # by frame: (2, objects) of each tracker
    later: set[int] = set()  # IDs in the masks of later frames
    number = 0
    for number, frame in enumerate(frames, start=1):
        classes = [track(frame.image) for track in trackers.values()]
        on_frame(TrackedFrame(number, frame.name, frame.image, ids[classes[0]], palette))
        target = _target(clip, frame.name, classes[0], binary=mask.binary, skip=skip)
        if target is not None:
            later |= set(object_ids(target))
            values[number] = [_score(one, target, objects) for one in classes]
    if later and not later & set(objects):
        raise UserError(
            f"{clip.name}: the first mask has the objects {_listed(objects)}, and no later mask has one of them, only "
            f"{_listed(sorted(later - {0}))}: all masks of a video must use the same numbers"
        )
    values.pop(number, None)  # the last frame's
    stacked = [torch.stack(of_tracker, dim=-1) for of_tracker in zip(*values.values(), strict=True)]
    by_name = dict(zip(trackers, stacked, strict=True)) if stacked else {}
    return TrackingResult(clip.name, objects, number + 1, len(values), by_name, _remarks(clip.name, mask.ids))


def _remarks(name: str, ids: Tensor) -> list[str]:
    """Return what is suspicious about the first mask (H, W) of a video."""
    rim = torch.cat([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
    objects = [number for number in object_ids(rim) if number not in (0, VOID)]
    covered = [number for number in objects if (rim == number).float().mean() > _RIM]
    text = "covers most of the border of the first mask; is it the background?"
    return [f"{name}: object {number} {text}" for number in covered]


def _listed(numbers: list[int]) -> str:
    return ", ".join("255 (void)" if number == VOID else str(number) for number in numbers) or "background"


def _first_mask(clip: Clip, name: str, image: Tensor) -> Mask:
    path = clip.masks.find(name, first=True)
    if path is None:
        raise UserError(f"{clip.name}: there is no mask with the name of the first frame, {name}, in {clip.masks.path}")
    try:
        mask = read_mask(path)
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error.reason}") from None
    if mask.ids.shape != image.shape[-2:]:
        raise UserError(f"{path} has {_size(mask.ids)} pixels, its frame {_size(image)}")
    return mask


def _target(clip: Clip, name: str, like: Tensor, *, binary: bool, skip: Skip) -> Tensor | None:
    """Read the true IDs (H, W) of a later frame, if there is a mask of its size."""
    path = clip.masks.find(name, first=False)
    if path is None:
        return None
    try:
        ids = read_mask(path, binary=binary).ids
        if ids.shape != like.shape:
            raise UnreadableImageError(path.name, f"the mask has {_size(ids)} pixels, its frame {_size(like)}")
    except UnreadableImageError as error:
        skip(UnreadableImageError(path.name, error.reason))
        return None
    return ids


def _score(classes: Tensor, target: Tensor, objects: list[int]) -> Tensor:
    """Compute J and F (2, objects) of one frame's classes (H, W) against its true IDs (H, W)."""
    valid = target != VOID
    masks = torch.stack([(classes == number) & valid for number in range(1, len(objects) + 1)])
    targets = torch.stack([target == number for number in objects])
    return torch.stack([region_similarity(masks, targets), boundary_accuracy(masks, targets)])


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]} x {pixels.shape[-2]}"
