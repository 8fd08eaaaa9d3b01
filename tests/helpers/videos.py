"""Make and read small videos."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.sources.video_frames import Frame, VideoFrames

av = pytest.importorskip("av")


def make_frame(number: int, width: int = 64, height: int = 48) -> Image.Image:
    """Make an image of brightness 10 x number, with a red upper left quarter that shows its orientation."""
    pixels = np.full((height, width, 3), 10 * number, dtype=np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    return Image.fromarray(pixels)


def write_video(path: Path, frames: int = 12, *, size=(64, 48), times=None, rate=25, rotation=0, codec="libx264"):
    """Write a video of `make_frame(0)`, `make_frame(1)`, ...; `times` are ticks of 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_image(make_frame(number, *size))
            frame.pts, frame.time_base = (times[number], Fraction(1, 1000)) if times else (number, Fraction(1, rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path):
    """Write a file with sound and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_video(path: Path) -> list[Frame]:
    """Read all frames of a video without errors."""
    return list(VideoFrames(path).read(pytest.fail))


def frame_numbers(frames) -> list[int]:
    """Return the number of each frame of `write_video`, by the brightness of the lower right corner."""
    return [round(frame.image[:, -10:, -10:].float().mean().item() / 10) for frame in frames]
