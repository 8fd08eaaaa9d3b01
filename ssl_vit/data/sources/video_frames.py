"""The frames of a video file or of a folder of images, one after the other, each with its time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ssl_vit.data.dataset import UnreadableImageError, escape_path
from ssl_vit.data.sources.image_folder import ImageFolder, scan_image_folder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FALLBACK_RATE = Fraction(25)  # frames a second, of a video that does not say

Skip = Callable[[UnreadableImageError], None]  # is told every frame that cannot be read


class Frame(NamedTuple):
    """One frame, upright."""

    name: str  # of its file; in a video its number from 0
    image: Tensor  # (3, H, W) uint8
    time: Fraction  # seconds since the first frame


class Frames(Protocol):
    """Frames in the order of their times."""

    rate: Fraction  # frames a second; their mean where the times are uneven
    clock: Fraction  # ticks a second, in which all times are whole numbers
    count: int | None  # how many there are, where that is known beforehand

    def read(self, skip: Skip) -> Iterator[Frame]:
        """All frames that can be read, one at a time."""
        ...


def open_frames(place: Path, *, fps: float) -> Frames:
    """The frames of a video file, or of a folder of images.

    Args:
        place: The file or the folder; the images' names are ordered as people count: frame2 before frame10.
        fps: Frames a second of a folder; a video has its own times.

    Raises:
        UserError: There is neither, it holds no image, or PyAV is missing for a video.
    """
    if place.is_file():
        return VideoFrames(place)
    return FolderFrames(place, fps)


class FolderFrames:
    """The images below a folder, in the natural order of their names.

    Raises:
        UserError: There is no such folder, or no image in it.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        found = scan_image_folder(folder)
        names = PackedPaths.from_iterable(sorted(found.names, key=lambda name: natural_sort_key(os.fsdecode(name))))
        self.dataset = ImageFolder(folder, names, ignored=found.ignored, labeled=False)
        self.rate = self.clock = Fraction(fps).limit_denominator(1001)
        self.count: int | None = len(self.dataset)

    def read(self, skip: Skip) -> Iterator[Frame]:
        """All frames that can be read; a broken one leaves a gap of its time."""
        for index in range(len(self.dataset)):
            try:
                image = self.dataset.read(index, 3)
            except UnreadableImageError as broken:
                skip(broken)
                continue
            yield Frame(self.dataset.name(index), image, index / self.rate)


class VideoFrames:
    """The first moving image of a video file, turned upright.

    Raises:
        UserError: PyAV is not installed, or the file is empty, no video, or holds sound alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as container:
            stream = first_video_stream(container, path)
            self.rate = stream.average_rate or stream.guessed_rate or FALLBACK_RATE
            self.clock = 1 / stream.time_base if stream.time_base else self.rate
            self.count = stream.frames or _estimated(stream, container, self.rate)

    def read(self, skip: Skip) -> Iterator[Frame]:
        """All frames that can be decoded; what is damaged is skipped, and decoding goes on behind it."""
        start = last = None
        for number, frame in enumerate(self._decoded(skip)):
            if frame.is_corrupt:
                skip(UnreadableImageError(f"frame {number}", "damaged in the file"))
                continue
            known = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
            time = known if known is not None else (Fraction(0) if last is None else last + 1 / self.rate)
            start = time if start is None else start
            last = time
            yield Frame(f"{number}", _upright(frame), max(Fraction(0), time - start))

    def _decoded(self, skip: Skip) -> Iterator[VideoFrame]:
        av = require_av()
        with _opened(self.path) as container:
            stream = first_video_stream(container, self.path)
            stream.thread_type = "AUTO"
            packets = container.demux(stream)
            number = -1
            while True:
                try:
                    packet = next(packets, None)
                    number += 1
                    if packet is None:
                        return
                    decoded = packet.decode()
                except av.error.EOFError:
                    return
                except av.FFmpegError as error:
                    skip(UnreadableImageError(f"packet {number}", error.strerror or "damaged"))
                    continue
                yield from decoded


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """A key that orders names as people count.

    >>> sorted(["f10.png", "f2.png", "F1.png"], key=natural_sort_key)
    ['F1.png', 'f2.png', 'f10.png']
    """
    parts = re.split(r"([0-9]+)", name)
    key = [(0, int(part), "") if place % 2 else (1, 0, part.casefold()) for place, part in enumerate(parts) if part]
    return [*key, (2, 0, name)]  # names that count alike stay in one order


def require_av() -> ModuleType:
    """PyAV, which only videos need.

    Raises:
        UserError: It is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError(
            "reading and writing videos needs PyAV: pip install 'ssl-vit[video]'; "
            "folders of images work without it, as video= and as out="
        ) from None
    return av


def _opened(path: Path) -> InputContainer:
    """The file's container; nothing but this file is ever opened for it, whatever it refers to."""
    av = require_av()
    if path.stat().st_size == 0:
        raise UserError(f"{escape_path(path)}: an empty file")
    try:
        container: InputContainer = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        raise UserError(f"{escape_path(path)}: no video that can be read ({error.strerror})") from None
    if container.format.name == "tty":  # FFmpeg takes any text for a drawing in letters
        container.close()
        raise UserError(f"{escape_path(path)}: no video but a text file")
    return container


def first_video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first stream of images that is not the cover of a piece of music."""
    av = require_av()
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        holds = "sound but no moving images" if container.streams.audio else "no moving images"
        raise UserError(f"{escape_path(path)}: the file holds {holds}")
    return streams[0]


def _estimated(stream: VideoStream, container: InputContainer, rate: Fraction) -> int | None:
    """How many frames a file should have that does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return max(1, round(stream.duration * stream.time_base * rate))
    return max(1, round(Fraction(container.duration, 1_000_000) * rate)) if container.duration else None


def _upright(frame: VideoFrame) -> Tensor:
    """The frame's pixels (3, H, W) uint8, turned as the file says that they are to be shown."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90) % 4, dims=(1, 2))
