"""Attention of the [CLS] token in the frames of a video, drawn over the frames, written as a video or as images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path, PurePosixPath
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.video_frames import Frame, Skip, require_av
from ssl_vit.evaluation.segmentation.image_outputs import BATCH_PIXELS, normalize
from ssl_vit.models.attention_maps import attention_mass_mask, cls_attention, resize_to_patch_multiple
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import to_pil
from ssl_vit.visualization.overlays import color_scale_max, draw_map

if TYPE_CHECKING:
    from av.video.stream import VideoStream

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # FFmpeg's names
CODECS = {"libx264": {"crf": "18", "preset": "medium"}, "mpeg4": {"qmin": "2", "qmax": "5"}}  # by preference
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers; players assume this color space, and values of 16 to 235
MAX_CLOCK = 65_535  # ticks per second that MPEG-4 can store
PENDING_PIXELS = 2**23  # of frames at their own size in one batch
SCALE_MOMENTUM = 0.95  # of the color scale per frame: it adapts within about a second

WriteFrame = Callable[[str, Image.Image, Fraction], None]  # name of the frame, image, time in seconds


class FrameAttention(NamedTuple):
    """One frame with its attention map."""

    frame: Frame
    map: Tensor  # (rows, columns) float32, sums to 1: of one head, or the mean of the heads


def iter_attention(
    frames: Iterable[Frame], model: LoadedBackbone, *, head: int | None, max_side: int | None, skip: Skip
) -> Iterator[list[FrameAttention]]:
    """Yield batches of consecutive frames of one size with the [CLS] attention of the last block, in order.

    Args:
        frames: Of any size.
        model: With a class token and as many channels as the frames.
        head: Number of the head from 0; None: the mean of the heads.
        max_side: Larger frames are reduced to this many pixels for the model; None: never.
        skip: Called for every frame that is too small.

    Raises:
        UserError: There is no such head.
    """
    heads = model.backbone.num_heads
    if head is not None and head >= heads:
        raise UserError(f"head={head}: the model has {heads} heads, numbered from 0")
    batch: list[tuple[Frame, Tensor]] = []
    for frame in frames:
        try:
            resized = resize_to_patch_multiple(frame.image, model.backbone.patch_size, max_side)
        except UserError as too_small:
            skip(UnreadableImageError(frame.name, str(too_small)))
            continue
        most = min(BATCH_PIXELS // resized[0].numel(), PENDING_PIXELS // frame.image[0].numel())
        if batch and (batch[0][1].shape != resized.shape or len(batch) >= most):
            yield _compute_attention(batch, model, head)
            batch = []
        batch.append((frame, resized))
    if batch:
        yield _compute_attention(batch, model, head)


def _compute_attention(
    batch: list[tuple[Frame, Tensor]], model: LoadedBackbone, head: int | None
) -> list[FrameAttention]:
    pixels = torch.stack([resized for _, resized in batch]).to(model.backbone.device).float() / 255  # (B, 3, h, w)
    maps = cls_attention(model.backbone, normalize(pixels, model))[0].cpu()  # (B, heads, rows, columns)
    chosen = maps.mean(1) if head is None else maps[:, head]
    return [FrameAttention(frame, map_) for (frame, _), map_ in zip(batch, chosen, strict=True)]


class AttentionRenderer:
    """Renderer of consecutive frames whose color scale changes slowly, so that the video does not flicker.

    The upper end of the color scale is a running mean of the upper ends of single frames (their 99.5 % quantile, at
    least six times uniform); it starts at the median of the first batch. The outlined mask has `attention_mass`, a
    share of the attention.
    """

    def __init__(self, attention_mass: float) -> None:
        self.attention_mass = attention_mass
        self.top: float | None = None  # times uniform attention

    def draw(self, batch: list[FrameAttention]) -> Iterator[Image.Image]:
        """Yield each frame in dimmed gray under the colors of its attention, at its own size."""
        tops = [color_scale_max(found.map[None]) for found in batch]
        for (frame, map_), own in zip(batch, tops, strict=True):
            self.top = median(tops) if self.top is None else SCALE_MOMENTUM * self.top + (1 - SCALE_MOMENTUM) * own
            yield draw_map(to_pil(frame.image), map_, attention_mass_mask(map_, self.attention_mass), top=self.top)


@contextmanager
def image_writer(directory: Path) -> Iterator[WriteFrame]:
    """Provide a function that writes frames as JPEG files, named as the frames or by their numbers in a video."""
    directory.mkdir(parents=True, exist_ok=True)

    def write(name: str, image: Image.Image, time: Fraction) -> None:
        stem = f"{int(name):06d}" if name.isdecimal() else PurePosixPath(name).with_suffix("").as_posix()
        path = directory / f"{stem}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            image.save(file, format="JPEG", quality=90, subsampling=0)

    yield write


@contextmanager
def video_writer(path: Path, *, rate: Fraction, clock: Fraction) -> Iterator[WriteFrame]:
    """Provide a function that writes frames into a video file, which exists, complete, after the block.

    Frames keep their times, rounded to `clock` ticks per second; `rate` is their mean number per second. The size of
    the video is that of the first frame, its sides made even for H.264 by repeating the last line; frames of other
    sizes are scaled to fit, on black. The color space is BT.709. The path has a suffix of `CONTAINERS`.

    Raises:
        UserError: PyAV is missing, or was built without any of `CODECS`.
    """
    av = require_av()
    codec = video_codec()
    clock = clock if clock.numerator <= MAX_CLOCK else Fraction(60_000)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, av.open(file, "w", format=CONTAINERS[path.suffix.lower()]) as container:
        stream: VideoStream = container.add_stream(codec, rate=rate, options=CODECS[codec])
        last = -1

        def write(name: str, image: Image.Image, time: Fraction) -> None:
            nonlocal last
            if last < 0:
                _configure_stream(stream, image, clock)
            pixels = _fit_pixels(image, stream.width, stream.height)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            last = frame.pts = max(last + 1, round(time * clock))
            frame.time_base, frame.duration = 1 / clock, max(1, round(clock / rate))
            container.mux(stream.encode(frame))

        yield write
        if last >= 0:
            container.mux(stream.encode(None))


def video_codec() -> str:
    """Return the first of `CODECS` that the installed PyAV can write.

    Raises:
        UserError: It can write none.
    """
    av = require_av()
    for name in CODECS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise UserError(
        f"this build of PyAV can write none of {', '.join(CODECS)}; write images into a directory with out=overlay"
    )


def _configure_stream(stream: VideoStream, first: Image.Image, clock: Fraction) -> None:
    stream.width, stream.height, stream.pix_fmt = *(side + side % 2 for side in first.size), "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / clock
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE


def _fit_pixels(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return the RGB values (height, width, 3) of an image at the size of the video."""
    if (image.width + image.width % 2, image.height + image.height % 2) != (width, height):
        return np.asarray(ImageOps.pad(image, (width, height)))
    return np.pad(np.asarray(image), ((0, height - image.height), (0, width - image.width), (0, 0)), mode="edge")
