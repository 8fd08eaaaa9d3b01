"""Read values of more than 8 bits, signed values and floats of an image file, and rescale them to 8 bits.

With a `ValueRange` its two values, or two percentiles of all values of the image, become 0 and 255, in gray and color
images alike; what lies outside is clipped, and pixels without data become black. Without one:

Gray values: the image's own range becomes 0 to 255. Pixels without data do not count and become black: those of a tag
or of a usual value, and of 1 % of the pixels or more with a value farther from all others than these spread. Where the
darkest and the brightest 0.2 % of the values take up more than half of the range, as hot and dead pixels do, they are
clipped.

Colors of 16 bits: the upper eight of the bits that the image uses, the brightest 0.2 % of its values aside. They keep
their proportions, and those that use all bits their exact values.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, EXTRASAMPLES, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, SAMPLESPERPIXEL

from ssl_vit.config.types import AUTO_RANGE, ValueRange

CLIPPED = 500  # one of so many values is clipped at each end
_SAMPLED = 4_000_000  # values from which the range is found
_STRIP = 256  # rows rescaled at once; whole images in float64 would take several times their memory

_GDAL_NODATA = 42113  # TIFF tag: the value of pixels without data, as text
_SHARE = 0.01  # least share of the pixels without data, where no tag and no usual value tells them
# Written for pixels without data where the tag is missing: they count as such if they are an image's smallest value.
_NODATA = (-9999.0, -99999.0, -32768.0, -32767.0, -2147483648.0, float(np.finfo(np.float32).min), -1e38, -1e20)

_SIGNED = 2  # TIFF sample format
_NATIVE, _SWAPPED = ("L", "B") if sys.byteorder == "little" else ("B", "L")
# Pillow keeps the upper byte of 16-bit colors. The raw mode of the other byte order gives it the lower one.
_LOWER_BYTE = {
    f"{bands};16{order}": f"{bands};16{_SWAPPED if order in ('N', _NATIVE) else _NATIVE}"
    for bands in ("RGB", "RGBX", "RGBA")
    for order in "LBN"
}

Values = npt.NDArray[Any]


class DeepValues(NamedTuple):
    """The values of an image."""

    values: Values  # (H, W) or (H, W, 3)
    alpha: npt.NDArray[np.uint8] | None  # (H, W)


def is_deep(image: Image.Image) -> bool:
    """Return whether an opened image has values other than unsigned ones of 8 bits."""
    return image.mode.startswith(("I", "F")) or _is_signed_8bit(image) or ";16" in _raw_mode(image)


def read_deep_values(image: ImageFile.ImageFile) -> DeepValues | None:
    """Load an opened image, and return its values if `is_deep`."""
    raw, deep = _raw_mode(image), is_deep(image)
    lower = _decode_with(image, _LOWER_BYTE[raw]) if raw in _LOWER_BYTE else None
    pairs = _decode_with(image, "RGBA").view(">u2") if raw == "LA;16B" else None  # four bytes a pixel, as in RGBA
    image.load()
    if not deep or image.mode == "CMYK":
        return None
    if pairs is not None:
        return DeepValues(pairs[..., 0], (pairs[..., 1] >> 8).astype(np.uint8))
    values: Values = np.asarray(image)
    if _is_signed_8bit(image):
        return DeepValues(values.view(np.int8), None)
    if values.dtype == np.int32 and tiff_tag(image, BITSPERSAMPLE) == (32,) and tiff_tag(image, SAMPLEFORMAT) != (2,):
        return DeepValues(values.view(np.uint32), None)
    if values.ndim == 2:
        return DeepValues(values, None)
    alpha = values[..., 3] if image.mode == "RGBA" and not has_false_alpha(image) else None
    colors = values[..., :3]
    return DeepValues(colors if lower is None else colors * np.uint16(256) + lower[..., :3], alpha)


def has_false_alpha(image: Image.Image) -> bool:
    """Return whether the last band of a loaded TIFF is no transparency: the file does not say so, or all of it is 0."""
    if image.format != "TIFF" or image.mode not in ("RGBA", "LA"):
        return False
    return tiff_tag(image, EXTRASAMPLES) is None or image.getextrema()[-1] == (0, 0)


def rescale_deep_values(image: Image.Image, deep: DeepValues, value_range: ValueRange = AUTO_RANGE) -> Image.Image:
    """Rescale the values of an image to 8 bits, L or RGB, with transparent parts on white; WhiteIsZero is inverted.

    Raises:
        ValueError: No pixel has data.
    """
    keeps_proportions = deep.values.ndim == 3 and value_range.is_auto
    opaque = Image.fromarray(_upper_bits(deep.values) if keeps_proportions else _stretch(image, deep, value_range))
    if deep.alpha is None:
        return opaque
    white = Image.new("RGB", opaque.size, "white")
    return Image.composite(opaque.convert("RGB"), white, Image.fromarray(deep.alpha))


def _upper_bits(colors: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Return the upper eight of the bits in use."""
    flat = colors.reshape(-1)
    sample = flat[:: -(-flat.size // _SAMPLED) or 1]
    below = sample[sample < sample.max()]
    if below.size and sample.size - below.size > sample.size // CLIPPED and below.max() < sample.max() / 2:
        sample = below  # saturated pixels, a frame or a scale bar stay white
    brightest = int(np.partition(sample, sample.size - 1 - sample.size // CLIPPED)[-1 - sample.size // CLIPPED])
    unused = max(0, brightest.bit_length() - 8)
    upper: npt.NDArray[np.uint8] = np.minimum(colors >> unused, 255).astype(np.uint8)
    return upper


def _stretch(image: Image.Image, deep: DeepValues, value_range: ValueRange) -> npt.NDArray[np.uint8]:
    """Stretch values from a range, or gray ones from their own, to 0 and 255."""
    values, declared = deep.values, _declared_nodata(image)
    valid_alpha = None if deep.alpha is None or not deep.alpha.any() else deep.alpha > 0
    visible = values if valid_alpha is None else values[valid_alpha]
    low, high, nodata = own_range(visible, declared) if value_range.is_auto else _given(visible, declared, value_range)
    inverted = image.format == "TIFF" and tiff_tag(image, PHOTOMETRIC_INTERPRETATION) == 0
    scale = 255 / (high - low) if high > low else 0.0
    strips = []
    for strip in (values[top : top + _STRIP] for top in range(0, len(values), _STRIP)):
        valid = np.isfinite(strip) & ~np.isin(strip, nodata)
        shifted = np.where(valid, strip, low).astype(np.float64) - low
        scaled = (shifted * scale).clip(0, 255).round().astype(np.uint8)
        strips.append(np.where(valid, 255 - scaled if inverted else scaled, np.uint8(0)))
    return np.concatenate(strips)


def _given(values: Values, declared: float | None, given: ValueRange) -> tuple[float, float, list[float]]:
    """Return the values of a given range, or of the percentiles of the values with data, as `own_range` does.

    Raises:
        ValueError: No pixel has data.
    """
    assert given.low is not None and given.high is not None
    nodata = [] if declared is None else [declared]
    least, _ = _extremes(values, nodata)
    if declared is None and least in _NODATA and (given.percentiles or least < given.low):
        nodata = [least]
    if not given.percentiles:
        return given.low, given.high, nodata
    flat = values.reshape(-1)
    sample = flat[:: -(-flat.size // _SAMPLED) or 1]
    sample = sample[np.isfinite(sample) & ~np.isin(sample, nodata)]
    low, high = np.percentile(sample, [given.low, given.high])
    if low == high:  # nearly all values are one
        low, high = _extremes(values, nodata)
    return float(low), float(high), nodata


def own_range(values: Values, declared: float | None) -> tuple[float, float, list[float]]:
    """Return the values that become 0 and 255, and those of pixels without data.

    Raises:
        ValueError: No pixel has data.
    """
    nodata = [] if declared is None else [declared]
    least, most = _extremes(values, nodata)
    if declared is None and (found := _unusual(values, least, most)) is not None:
        nodata = [found]
        least, most = _extremes(values, nodata)
    flat = values.reshape(-1)
    sample = flat[:: -(-flat.size // _SAMPLED) or 1]
    sample = sample[np.isfinite(sample) & ~np.isin(sample, nodata)]
    if clipped := sample.size // CLIPPED:
        ordered = np.partition(sample, (clipped, sample.size - 1 - clipped))
        low, high = float(ordered[clipped]), float(ordered[-1 - clipped])
        if 0 < high - low < (most - least) / 2:
            return low, high, nodata
    return least, most, nodata


def _unusual(values: Values, least: float, most: float) -> float | None:
    """Return the value of pixels without data: one that is written for them, or one far from all others.

    It is the smallest or the largest, that of 1 % of the pixels or more, and farther from the next value than the range
    of all the others.
    """
    if least in _NODATA:
        return least
    for value in (least, most):
        if (values == value).mean() >= _SHARE and least < most:
            low, high = _extremes(values, [value]) if (values != value).any() else (least, most)
            if min(abs(value - low), abs(value - high)) > high - low > 0:
                return value
    return None


def _extremes(values: Values, nodata: list[float]) -> tuple[float, float]:
    """Return the smallest and the largest value with data."""
    strips = (values[top : top + _STRIP] for top in range(0, len(values), _STRIP))
    parts = (strip[np.isfinite(strip) & ~np.isin(strip, nodata)] for strip in strips)
    ranges = [(part.min(), part.max()) for part in parts if part.size]
    if not ranges:
        raise ValueError("no pixel is a finite number with data")
    return float(min(least for least, _ in ranges)), float(max(most for _, most in ranges))


def tiff_tag(image: Image.Image, tag: int) -> object:
    """Return the value of a tag; None for images that are no TIFF."""
    return getattr(image, "tag_v2", {}).get(tag)


def describe_bands(image: Image.Image) -> str:
    """Return what of a TIFF is not used, such as `4 bands, the first 3 used`; empty if there is nothing."""
    count = int(str(tiff_tag(image, SAMPLESPERPIXEL) or 0))
    used = {"L": 1, "I;16": 1, "RGB": 3, "RGBA": 4, "LA": 2}
    kept = used.get(image.mode, count) - has_false_alpha(image)
    return f"{count} bands, the first {kept} used" if 0 < kept < count else ""


def _decode_with(image: ImageFile.ImageFile, raw_mode: str) -> npt.NDArray[np.uint8]:
    """Decode an image that is opened but not loaded once more, with another raw mode."""
    assert image.fp is not None
    position = image.fp.tell()
    image.fp.seek(0)
    with Image.open(BytesIO(image.fp.read()), formats=[image.format or ""]) as other:
        other.tile = [
            tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *(tile.args or ())[1:]))
            for tile in other.tile
        ]
        if raw_mode == "RGBA":
            other._mode = raw_mode
        other.load()
        pixels = np.array(other)
    image.fp.seek(position)
    return pixels


def _raw_mode(image: Image.Image) -> str:
    """Return how Pillow unpacks the pixels of an image that is not loaded yet; empty if it does not say."""
    for tile in getattr(image, "tile", []):
        args = tile[3]
        return str(args if isinstance(args, str) else args[0] if args else "")
    return ""


def _is_signed_8bit(image: Image.Image) -> bool:
    return image.mode == "L" and tiff_tag(image, SAMPLEFORMAT) == (_SIGNED,)


def _declared_nodata(image: Image.Image) -> float | None:
    with suppress(TypeError, ValueError):
        return float(str(tiff_tag(image, _GDAL_NODATA)).strip("\0 "))
    return None
