"""One image file of any format and mode as a uint8 tensor."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from ssl_vit.data.dataset import JPEGScaleFn, UnreadableImageError, escape_path

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
)
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB: from here on Pillow warns of decompression bombs
MAX_SCANS = 100  # of a JPEG; encoders write up to a dozen, and each costs as much time as a whole image

_DAMAGE = (  # what Pillow's readers have been seen to raise on damaged files: nearly every built-in error
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RuntimeError, AssertionError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

_STRIP = 256  # rows that are stretched at once

_UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_ON_ITS_SIDE = 5  # of the orientations: from here on, height and width change places
_BLOCK = 8  # pixels of a JPEG's block, along a side


def decode(path: Path | BytesIO, channels: int = 3, jpeg_scale: JPEGScaleFn | None = None) -> Tensor:
    """Read a JPEG, PNG, WebP, BMP, TIFF, GIF (first frame) or PPM file; the content tells which, not the name.

    EXIF orientation is applied. Transparent parts are laid on white, as most viewers show them. Gray of 16 bits, 32
    bits and floats is stretched from the image's own smallest and largest value to 0 and 255, because devices seldom
    use the whole range of their files. Of colors of 16 bits the upper 8 count.

    Args:
        path: The file, or its bytes.
        channels: 3 for RGB, 1 for gray (ITU-R 601 luma).
        jpeg_scale: By how much the image may be decoded smaller. Only JPEGs are: from fewer coefficients of each block
            of 8 x 8 pixels, in a fraction of the time, about as if the pixels of the whole image had been averaged.

    Returns:
        (C, H, W) uint8, channels last in memory: crops of it resize twice as fast so.

    Raises:
        UnreadableImageError: The file is missing, damaged, of another format, no regular file, or holds more than MAX_PIXELS
            pixels or MAX_SCANS scans.
    """
    with open_image(path) as image:
        if jpeg_scale is not None and isinstance(image, JpegImageFile):
            _decode_smaller(image, jpeg_scale)
        return to_tensor(image, channels)


@contextmanager
def open_image(path: Path | BytesIO) -> Iterator[ImageFile.ImageFile]:
    """An image whose header has been read; what goes wrong with it inside the block is a UnreadableImageError.

    Raises:
        UnreadableImageError: As for `decode`.
    """
    name = escape_path(path) if isinstance(path, Path) else "an image in memory"
    empty = isinstance(path, BytesIO) and path.getbuffer().nbytes == 0
    try:
        if isinstance(path, Path):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
                raise UnreadableImageError(name, "no file but a directory, pipe, socket or device")
            empty = status.st_size == 0
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.info.get("progressive") and _scans(image) > MAX_SCANS:
                raise UnreadableImageError(name, f"a JPEG of more than {MAX_SCANS} scans, made to take long")
            yield image
    except _DAMAGE as error:
        raise UnreadableImageError(name, _reason(error, empty=empty)) from error


def _scans(image: ImageFile.ImageFile) -> int:
    """How many scans a progressive JPEG has: markers that cannot occur inside of one; those of previews count too."""
    assert image.fp is not None  # until its pixels are loaded
    image.fp.seek(0)
    return image.fp.read().count(b"\xff\xda")


def _decode_smaller(image: JpegImageFile, jpeg_scale: JPEGScaleFn) -> None:
    """Let the image be loaded by `jpeg_scale` smaller; each of its pixels then stands for a square of so many."""
    width, height = image.size
    turn = orientation(image)
    if turn != 1 and (width % _BLOCK or height % _BLOCK):  # turned, an incomplete square would come first
        return
    by = jpeg_scale(width, height) if turn >= _FIRST_ON_ITS_SIDE else jpeg_scale(height, width)
    image.draft(None, (width // by, height // by))


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """The pixels (C, H, W) uint8 of an opened image, upright, with 1 or 3 channels; see `decode`."""
    image.load()  # TIFF turns itself upright here
    turn = _UPRIGHT.get(orientation(image))
    flat, mode = _flattened(image), "RGB" if channels == 3 else "L"
    if flat.mode != mode:
        flat = flat.convert(mode)
    if turn is not None:
        flat = flat.transpose(turn)
    return torch.from_numpy(np.array(flat).reshape(flat.height, flat.width, channels)).permute(2, 0, 1)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:  # of the EXIF data; the pixels may be good all the same
        return 1
    return value if value in _UPRIGHT else 1


def _flattened(image: Image.Image) -> Image.Image:
    """The image with 8 bits and without transparency."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(to_uint8_range(np.asarray(image)))
    if image.mode == "LAB":  # which Pillow turns into RGB only
        return image.convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def to_uint8_range(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Values (H, W) from their own range to 0..255; not-a-numbers and infinities become 0.

    Strip by strip, so that the float64 in which it is computed never takes several times the image.
    """
    strips = [values[top : top + _STRIP] for top in range(0, len(values), _STRIP)]
    ends = [(part.min(), part.max()) for strip in strips if (part := strip[np.isfinite(strip)]).size]
    if not ends:
        raise ValueError("no pixel is a finite number")
    low, high = float(min(least for least, _ in ends)), float(max(most for _, most in ends))
    scale = 255 / (high - low) if high > low else 0.0
    finite = (np.where(np.isfinite(strip), strip, low).astype(np.float64) for strip in strips)
    return np.concatenate([((strip - low) * scale).round().astype(np.uint8) for strip in finite])


def _reason(error: Exception, *, empty: bool) -> str:
    """Why an image is skipped, in one line."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS:,} pixels, perhaps a decompression bomb"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if empty:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}, or its first bytes are damaged"
    return escape_path(" ".join(str(error).split())) or type(error).__name__
