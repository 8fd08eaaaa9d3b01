"""What the [CLS] token looks at in every frame of a video, drawn over the frame, as a video or as images."""

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

KINDS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # FFmpeg's names
CODECS = {"libx264": {"crf": "18", "preset": "medium"}, "mpeg4": {"qmin": "2", "qmax": "5"}}  # the better one first
BT709 = 1  # FFmpeg's number, of the colors that players take for granted
FINEST = 65_535  # ticks a second: MPEG-4 has no finer clock
HELD_PIXELS = 2**23  # of frames at their own size that wait for the model
CARRY = 0.95  # share of the color scale that the next frame takes over: it follows within about a second

Write = Callable[[str, Image.Image, Fraction], None]  # name of the frame, what is drawn, seconds


class FrameAttention(NamedTuple):
    """One frame and where the model looks."""

    frame: Frame
    map: Tensor  # (rows, columns) float32, sums to 1: one head's, or the heads' mean


def iter_attention(
    frames: Iterable[Frame], model: LoadedBackbone, *, head: int | None, max_side: int | None, skip: Skip
) -> Iterator[list[FrameAttention]]:
    """Batches of frames in their order, with the [CLS] attention of the last block.

    Args:
        frames: Of any size; those of one fitted size that follow each other go through the model together.
        model: With a class token and as many channels as the frames.
        head: Its number from 0; None: the heads' mean.
        max_side: Larger frames are reduced to this many pixels for the model; None: never.
        skip: Is told every frame that is too small.

    Raises:
        UserError: There is no such head.
    """
    heads = model.backbone.num_heads
    if head is not None and head >= heads:
        raise UserError(f"head={head}: the model has {heads} heads, numbered from 0")
    waiting: list[tuple[Frame, Tensor]] = []
    for frame in frames:
        try:
            fitted = resize_to_patch_multiple(frame.image, model.backbone.patch_size, max_side)
        except UserError as too_small:
            skip(UnreadableImageError(frame.name, str(too_small)))
            continue
        if waiting and not _joins(frame, fitted, waiting):
            yield _see(waiting, model, head)
            waiting = []
        waiting.append((frame, fitted))
    if waiting:
        yield _see(waiting, model, head)


def _joins(frame: Frame, fitted: Tensor, waiting: list[tuple[Frame, Tensor]]) -> bool:
    """Whether a frame goes through the model together with those that wait."""
    count = len(waiting) + 1
    same = waiting[0][1].shape == fitted.shape
    return same and count * fitted[0].numel() <= BATCH_PIXELS and count * frame.image[0].numel() <= HELD_PIXELS


def _see(batch: list[tuple[Frame, Tensor]], model: LoadedBackbone, head: int | None) -> list[FrameAttention]:
    device = model.backbone.device
    pixels = torch.stack([fitted for _, fitted in batch]).to(device).float() / 255  # (B, 3, h, w)
    maps = cls_attention(model.backbone, normalize(pixels, model))[0].cpu()  # (B, heads, rows, columns)
    chosen = maps.mean(1) if head is None else maps[:, head]
    return [FrameAttention(frame, map_) for (frame, _), map_ in zip(batch, chosen, strict=True)]


class AttentionRenderer:
    """Draws one frame after the other; colors change their meaning slowly, so that nothing flickers.

    The upper end of the color scale is a running mean of what each frame alone would have (its 99.5 % quantile, at
    least six times uniform), which begins at the median of the first batch.

    Args:
        mass: Share of the attention that the outlined mask holds.
    """

    def __init__(self, mass: float) -> None:
        self.mass = mass
        self.top: float | None = None  # times uniform attention

    def draw(self, batch: list[FrameAttention]) -> Iterator[Image.Image]:
        """Each frame in dim gray under the colors of its attention, at its own size."""
        tops = [color_scale_max(seen.map[None]) for seen in batch]
        for (frame, map_), own in zip(batch, tops, strict=True):
            self.top = median(tops) if self.top is None else CARRY * self.top + (1 - CARRY) * own
            picture = to_pil(frame.image, (frame.image.shape[-2], frame.image.shape[-1]))
            yield draw_map(picture, map_, attention_mass_mask(map_, self.mass), top=self.top)


@contextmanager
def image_writer(folder: Path) -> Iterator[Write]:
    """Writes each frame into a folder as a JPEG under its own name, a video's by its number."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, image: Image.Image, time: Fraction) -> None:
        stem = f"{int(name):06d}" if name.isdecimal() else PurePosixPath(name).with_suffix("").as_posix()
        path = folder / f"{stem}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            image.save(file, format="JPEG", quality=90, subsampling=0)

    yield write


@contextmanager
def video_writer(path: Path, *, rate: Fraction, clock: Fraction) -> Iterator[Write]:
    """Writes frames into a video file that is there, and whole, when the block ends.

    Frames keep their times. The first one's size counts, its sides made even by repeating the last line, as H.264
    wants it; frames of other sizes are fitted into it, their aspect kept, on black. Colors are BT.709, and said to be.

    Args:
        path: Its suffix is one of `KINDS`.
        rate: Frames a second, in the mean.
        clock: Ticks a second, in which times are rounded.

    Raises:
        UserError: PyAV is missing, or was built without any of `CODECS`.
    """
    av = require_av()
    codec = video_codec()
    clock = clock if clock.numerator <= FINEST else Fraction(60_000)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, av.open(file, "w", format=KINDS[path.suffix.lower()]) as container:
        stream: VideoStream = container.add_stream(codec, rate=rate, options=CODECS[codec])
        last = -1

        def write(name: str, image: Image.Image, time: Fraction) -> None:
            nonlocal last
            if last < 0:
                _set_up(stream, image, clock)
            pixels = _pixels(image, stream.width, stream.height)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            last = frame.pts = max(last + 1, round(time * clock))
            frame.time_base, frame.duration = 1 / clock, max(1, round(clock / rate))
            container.mux(stream.encode(frame))

        yield write
        if last >= 0:
            container.mux(stream.encode(None))


def video_codec() -> str:
    """The best of `CODECS` that the installed PyAV can write.

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
    raise UserError(f"this build of PyAV writes none of {', '.join(CODECS)}: name a folder, as in out=overlay")


def _set_up(stream: VideoStream, first: Image.Image, clock: Fraction) -> None:
    stream.width, stream.height, stream.pix_fmt = *(side + side % 2 for side in first.size), "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / clock
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = 1  # FFmpeg's number of 16 to 235, which players expect


def _pixels(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """The image's RGB (height, width, 3) at the video's size."""
    if (image.width + image.width % 2, image.height + image.height % 2) != (width, height):
        return np.asarray(ImageOps.pad(image, (width, height)))
    return np.pad(np.asarray(image), ((0, height - image.height), (0, width - image.width), (0, 0)), mode="edge")
