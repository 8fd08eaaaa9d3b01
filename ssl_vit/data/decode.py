"""One picture file of any format and mode as a uint8 tensor."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from ssl_vit.data.pictures import BrokenPicture, printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
)
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB: from here on Pillow warns of decompression bombs

_DAMAGE = (  # what Pillow's readers have been seen to raise on damaged files: nearly every built-in error
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RuntimeError, AssertionError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

_UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: Path | BytesIO, channels: int = 3) -> Tensor:
    """Read a JPEG, PNG, WebP, BMP, TIFF, GIF (first frame) or PPM file; the content tells which, not the name.

    EXIF orientation is applied. Transparent parts are laid on white, as most viewers show them. Pixels of 16 bits, 32
    bits and floats are stretched from the picture's own smallest and largest value to 0 and 255, because devices
    seldom use the whole range of their files.

    Args:
        path: The file, or its bytes.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).

    Returns:
        (C, H, W) uint8, channels last in memory: crops of it resize twice as fast so.

    Raises:
        BrokenPicture: The file is missing, damaged, of another format, or holds more than MAX_PIXELS pixels.
    """
    with opened(path) as picture:
        return to_tensor(picture, channels)


@contextmanager
def opened(path: Path | BytesIO) -> Iterator[ImageFile.ImageFile]:
    """A picture whose header has been read; what goes wrong with it inside the block is a BrokenPicture.

    Raises:
        BrokenPicture: As for `decode`.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield picture
    except _DAMAGE as error:
        name = printable(path) if isinstance(path, Path) else "a picture in memory"
        raise BrokenPicture(name, _reason(path, error)) from error


def to_tensor(picture: Image.Image, channels: int) -> Tensor:
    """The pixels (C, H, W) uint8 of an opened picture, upright, with 1 or 3 channels; see `decode`."""
    picture.load()  # TIFF turns itself upright here
    turn = _UPRIGHT.get(orientation(picture))
    flat = _flattened(picture).convert("RGB" if channels == 3 else "L")
    if turn is not None:
        flat = flat.transpose(turn)
    return torch.from_numpy(np.array(flat).reshape(flat.height, flat.width, channels)).permute(2, 0, 1)


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or none that can be read."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:  # of the EXIF data; the pixels may be good all the same
        return 1
    return value if value in _UPRIGHT else 1


def _flattened(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits and without transparency."""
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_stretched(np.asarray(picture, dtype=np.float64)))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA"))
    return picture


def _stretched(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Values (H, W) from their own range to 0..255; not-a-numbers and infinities become 0."""
    finite = np.isfinite(values)
    low, high = values[finite].min(), values[finite].max()
    scale = 255 / (high - low) if high > low else 0.0
    return np.where(finite, (values - low) * scale, 0).round().astype(np.uint8)


def _reason(path: Path | BytesIO, error: Exception) -> str:
    """Why a picture is skipped, in one line."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS:,} pixels, perhaps a decompression bomb"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if (path.stat().st_size if isinstance(path, Path) else path.getbuffer().nbytes) == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}, or its first bytes are damaged"
    return printable(" ".join(str(error).split())) or type(error).__name__
