"""Frames of a video file or of a folder of images, with their times."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

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

FALLBACK_RATE = Fraction(25)  # frames per second of a video without a frame rate

Skip = Callable[[UnreadableImageError], None]  # called for every frame that cannot be read


class Frame(NamedTuple):
    """One frame, upright."""

    name: str  # of the file; in a video the number from 0
    image: Tensor  # (3, H, W) uint8
    time: Fraction  # seconds since the first frame


def open_frames(path: Path, *, fps: float) -> FolderFrames | VideoFrames:
    """Open the frames of a video file, or of a folder of images at `fps` frames per second.

    Raises:
        UserError: The path does not exist, has no image, or is a video and PyAV is not installed.
    """
    return VideoFrames(path) if path.is_file() else FolderFrames(path, fps)


class FolderFrames:
    """The images below a folder, in natural order of their names: frame2 before frame10.

    Raises:
        UserError: The folder does not exist or has no image.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        dataset = scan_image_folder(folder)
        names = sorted(dataset.names, key=lambda name: natural_sort_key(os.fsdecode(name)))
        paths = PackedPaths.from_iterable(names)
        self.dataset = ImageFolder(folder, paths)
        self.rate = Fraction(fps).limit_denominator(1001)  # frames per second
        self.clock = self.rate  # ticks per second; all times are whole numbers of ticks
        self.count: int | None = len(self.dataset)

    def read(self, skip: Skip) -> Iterator[Frame]:
        """Yield all readable frames; unreadable ones leave gaps in time."""
        for index in range(len(self.dataset)):
            try:
                image = self.dataset.read(index, 3)
            except UnreadableImageError as error:
                skip(error)
                continue
            yield Frame(self.dataset.name(index), image, index / self.rate)


class VideoFrames:
    """The first video stream of a file, upright.

    Raises:
        UserError: PyAV is not installed, or the file is empty, not a video, or has only sound.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open_container(path) as container:
            stream = _first_video_stream(container, path)
            self.rate = stream.average_rate or stream.guessed_rate or FALLBACK_RATE  # the mean if times are uneven
            self.clock = 1 / stream.time_base if stream.time_base else self.rate
            self.count = stream.frames or _estimate_count(stream, container, self.rate)

    def read(self, skip: Skip) -> Iterator[Frame]:
        """Yield all frames that can be decoded; damaged ones are skipped and decoding continues after them."""
        start = last = None
        for number, frame in enumerate(self._decode(skip)):
            if frame.is_corrupt:
                skip(UnreadableImageError(f"frame {number}", "damaged in the file"))
                continue
            if frame.pts is not None and frame.time_base is not None:
                time = frame.pts * frame.time_base
            else:
                time = Fraction(0) if last is None else last + 1 / self.rate
            start = time if start is None else start
            last = time
            yield Frame(f"{number}", _upright(frame), max(Fraction(0), time - start))

    def _decode(self, skip: Skip) -> Iterator[VideoFrame]:
        av = require_av()
        with _open_container(self.path) as container:
            stream = _first_video_stream(container, self.path)
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
    """Return a sort key that orders numbers in names by value.

    >>> sorted(["f10.png", "f2.png", "F1.png"], key=natural_sort_key)
    ['F1.png', 'f2.png', 'f10.png']
    """
    parts = re.split(r"([0-9]+)", name)
    key = [(0, int(part), "") if index % 2 else (1, 0, part.casefold()) for index, part in enumerate(parts) if part]
    return [*key, (2, 0, name)]  # a fixed order of names such as 01 and 1


def require_av() -> ModuleType:
    """Import PyAV, which only videos need.

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


def _open_container(path: Path) -> InputContainer:
    """Open a video file, but no other file or address that it refers to."""
    av = require_av()
    if path.stat().st_size == 0:
        raise UserError(f"{escape_path(path)}: an empty file")
    try:
        container: InputContainer = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        raise UserError(f"{escape_path(path)}: not a readable video ({error.strerror})") from None
    if container.format.name == "tty":  # FFmpeg reads any text file as ASCII art
        container.close()
        raise UserError(f"{escape_path(path)}: a text file, not a video")
    return container


def _first_video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the first video stream that is not the cover image of a music file."""
    av = require_av()
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        found = "sound but no video" if container.streams.audio else "no video"
        raise UserError(f"{escape_path(path)}: the file has {found}")
    return streams[0]


def _estimate_count(stream: VideoStream, container: InputContainer, rate: Fraction) -> int | None:
    """Estimate the number of frames from the duration."""
    if stream.duration is not None and stream.time_base is not None:
        return max(1, round(stream.duration * stream.time_base * rate))
    return max(1, round(Fraction(container.duration, 1_000_000) * rate)) if container.duration else None


def _upright(frame: VideoFrame) -> Tensor:
    """Return the frame's pixels (3, H, W) uint8 with the rotation of the file applied."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90) % 4, dims=(1, 2))
