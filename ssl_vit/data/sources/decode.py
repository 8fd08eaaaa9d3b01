"""Decode an image file of any format and mode to a uint8 tensor."""

from __future__ import annotations

import logging
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from ssl_vit.config.types import AUTO_RANGE, ValueRange
from ssl_vit.data.dataset import JPEGScaleFn, UnreadableImageError, escape_path
from ssl_vit.data.sources.deep_values import DeepValues, has_false_alpha, read_deep_values, rescale_deep_values
from ssl_vit.data.sources.file_kinds import FORMATS, describe_kind

DECODING = 2  # grows when the same file gives other pixels, so that stored features are not used any more
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; above it Pillow warns of decompression bombs
MAX_SCANS = 100  # of a JPEG; encoders write up to a dozen, and each takes as long as a whole image

_DECODE_ERRORS = (  # raised by Pillow's readers on damaged files: nearly every built-in error
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(RuntimeError, AssertionError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # its reasons are in UnreadableImageError

_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_ROTATED = 5  # orientations from here on swap height and width
_BLOCK = 8  # side of a JPEG block in pixels


def decode(
    path: Path | BytesIO,
    channels: int = 3,
    jpeg_scale: JPEGScaleFn | None = None,
    value_range: ValueRange = AUTO_RANGE,
) -> Tensor:
    """Read an image file of one of FORMATS (of a GIF the first frame), identified by its content, not its name.

    EXIF orientation is applied. Transparent pixels are composited on white; a band of a TIFF is transparency only if
    the file says so. Values of more than 8 bits, signed values and floats are rescaled: from the range that the image
    uses, because devices seldom use the whole range of their files, or from `value_range`; see `deep_values`.

    The pixels (C, H, W) uint8, RGB or for one channel gray (ITU-R 601 luma), are channels last in memory, where crops
    resize twice as fast. `jpeg_scale` chooses by how much a JPEG is decoded smaller: from fewer coefficients of each
    block of 8 x 8 pixels, in a fraction of the time, approximately an average of the pixels.

    Raises:
        UnreadableImageError: The file is missing, damaged, of another format, not a regular file, or has more than
            MAX_PIXELS pixels or MAX_SCANS scans.
    """
    with open_image(path) as image:
        if jpeg_scale is not None and isinstance(image, JpegImageFile):
            _decode_smaller(image, jpeg_scale)
        return to_tensor(image, channels, value_range)


@contextmanager
def open_image(path: Path | BytesIO) -> Iterator[ImageFile.ImageFile]:
    """Open an image and read its header; errors inside the block become UnreadableImageError.

    Raises:
        UnreadableImageError: As `decode`.
    """
    name = escape_path(path) if isinstance(path, Path) else "an image in memory"
    empty = isinstance(path, BytesIO) and path.getbuffer().nbytes == 0
    try:
        if isinstance(path, Path):
            empty = file_size(path) == 0
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.info.get("progressive") and _count_scans(image) > MAX_SCANS:
                raise UnreadableImageError(
                    name, f"a JPEG of more than {MAX_SCANS} scans, which takes too long to decode"
                )
            yield image
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(name, _reason(error, path, empty=empty)) from error


def file_size(path: Path) -> int:
    """Return the bytes of a regular file; reading a pipe would wait for its other end, and a device may have no end.

    Raises:
        OSError: There is no such file.
        UnreadableImageError: It is not a regular file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError(escape_path(path), "not a regular file but a directory, pipe, socket or device")
    return status.st_size


def _count_scans(image: ImageFile.ImageFile) -> int:
    """Count the scans of a progressive JPEG by their markers, which cannot occur inside a scan; previews included."""
    assert image.fp is not None  # before its pixels are loaded
    image.fp.seek(0)
    return image.fp.read().count(b"\xff\xda")


def _decode_smaller(image: JpegImageFile, jpeg_scale: JPEGScaleFn) -> None:
    """Set up the image to be loaded smaller; each of its pixels is then the average of a square."""
    width, height = image.size
    rotation = orientation(image)
    if rotation != 1 and (width % _BLOCK or height % _BLOCK):  # rotated, an incomplete block would come first
        return
    scale = jpeg_scale(width, height) if rotation >= _FIRST_ROTATED else jpeg_scale(height, width)
    image.draft(None, (width // scale, height // scale))


def to_tensor(image: Image.Image, channels: int, value_range: ValueRange = AUTO_RANGE) -> Tensor:
    """Convert an opened image to pixels (C, H, W) uint8, upright, with 1 or 3 channels; see `decode`."""
    deep = read_deep_values(image) if isinstance(image, ImageFile.ImageFile) else None
    return values_to_tensor(image, deep, channels, value_range)


def values_to_tensor(image: Image.Image, deep: DeepValues | None, channels: int, value_range: ValueRange) -> Tensor:
    """Convert an opened image as `to_tensor`, whose values `read_deep_values` has read."""
    image.load()  # applies the orientation of TIFF files
    transposition, mode = _UPRIGHT.get(orientation(image)), "RGB" if channels == 3 else "L"
    image = rescale_deep_values(image, deep, value_range) if deep else _to_opaque_8bit(image)
    if image.mode != mode:
        image = image.convert(mode)
    if transposition is not None:
        image = image.transpose(transposition)
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, channels)).permute(2, 0, 1)


def upright(image: Image.Image) -> Image.Image:
    """Return a loaded image turned as its EXIF orientation says."""
    transposition = _UPRIGHT.get(orientation(image))
    return image if transposition is None else image.transpose(transposition)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is missing or unreadable."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:  # in the EXIF data; the pixels may still be readable
        return 1
    return value if value in _UPRIGHT else 1


def _to_opaque_8bit(image: Image.Image) -> Image.Image:
    """Convert the image to 8 bits without transparency."""
    if has_false_alpha(image):
        return image.convert("RGB" if image.mode == "RGBA" else "L")
    if image.mode == "LAB":  # Pillow converts it to RGB only
        return image.convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _reason(error: Exception, path: Path | BytesIO, *, empty: bool) -> str:
    """Describe in one line why an image cannot be read."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS:,} pixels, perhaps a decompression bomb"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if empty:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        if kind := describe_kind(path):
            return f"{kind}, which is not read; convert it to one of {', '.join(FORMATS)} of 1, 3 or 4 bands"
        return f"none of {', '.join(FORMATS)}, or its first bytes are damaged"
    return escape_path(" ".join(str(error).split())) or type(error).__name__
