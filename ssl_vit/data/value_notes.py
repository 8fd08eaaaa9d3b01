"""Say what was chosen while decoding: ranges that were stretched, bands and transparency of TIFFs, dark images."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import ImageFile
from torch import Tensor

from ssl_vit.config.types import AUTO_RANGE, ValueRange
from ssl_vit.data.dataset import ImageDataset, UnreadableImageError, evenly_spaced
from ssl_vit.data.sources.decode import open_image, values_to_tensor
from ssl_vit.data.sources.deep_values import DeepValues, describe_bands, has_false_alpha, own_range, read_deep_values
from ssl_vit.runtime.workers import map_threads

_SAMPLED = 16  # images of a dataset that are looked at before a run
_SMALL_RANGE = 64  # of 256 values: darker or flatter than any well exposed photograph
_SHARE = 0.1  # of the sampled images; single flat ones are common
_CLIPPED_SHARE = 0.01  # of an image's values; hot pixels and highlights are clipped on purpose

STRETCHED = (
    "have more than 8 bits, signed values or floats: gray is stretched from each image's own range to 0..255, and of "
    "colors the upper 8 of the bits in use are kept; where values mean the same in all images, give them one range"
)
UNUSUAL = "have pixels of one value far from all others, which are taken for pixels without data and become black"
CLIPPED = "have more than 1 % of their values outside data.range, which become black or white"
PLAIN = "have 8 bits: data.range does not change them"
NARROW = f"use less than a quarter of the range 0..255 ({_SMALL_RANGE} values): dark, flat, or converted wrongly"
VEILED = (
    "are TIFFs of mostly transparent pixels, laid on white as the file says; if the last band is no transparency "
    "(near infrared), write it with ExtraSamples 0"
)


class DecodedImage(NamedTuple):
    """Pixels, and what a user must know about how they were decoded."""

    pixels: Tensor  # (3, H, W) uint8
    remarks: tuple[str, ...]


def decode_with_remarks(image: ImageFile.ImageFile, value_range: ValueRange = AUTO_RANGE) -> DecodedImage:
    """Decode an opened image as `decode` does."""
    deep = read_deep_values(image)
    pixels = values_to_tensor(image, deep, 3, value_range)
    remarks = _range_remarks(deep, value_range)
    if bands := describe_bands(image):
        remarks.append(f"are TIFFs of {bands}")
    if image.format == "TIFF" and image.mode == "RGBA" and not has_false_alpha(image):
        opaque = np.asarray(image.getchannel("A")) == 255
        remarks += [VEILED] if opaque.mean() < 0.5 else []
    if int(pixels.max()) - int(pixels.min()) < _SMALL_RANGE:
        remarks.append(NARROW)
    return DecodedImage(pixels, tuple(remarks))


def _range_remarks(deep: DeepValues | None, value_range: ValueRange) -> list[str]:
    if value_range.is_auto:
        lacks = deep is not None and deep.values.ndim == 2 and bool(own_range(deep.values, None)[2])
        return [] if deep is None else [STRETCHED, *([UNUSUAL] if lacks else [])]
    if deep is None:
        return [PLAIN]
    if value_range.percentiles:
        return []
    outside = (deep.values < value_range.low) | (deep.values > value_range.high)
    return [CLIPPED] if outside.mean() > _CLIPPED_SHARE else []


def format_remarks(images: Iterable[tuple[str, tuple[str, ...]]], total: str, *, least: int = 1) -> list[str]:
    """Return one line for each remark that at least so many of the images (name, remarks) have."""
    names: dict[str, list[str]] = {}
    for name, remarks in images:
        for remark in remarks:
            names.setdefault(remark, []).append(name)
    return [
        f"{len(found):,} of {total} {remark}; the first is {found[0]}"
        for remark, found in names.items()
        if len(found) >= least
    ]


def value_notes(dataset: ImageDataset) -> list[str]:
    """Look at a few images, and return what a user must know about how they are decoded."""
    given = dataset.value_range
    indices = evenly_spaced(len(dataset), _SAMPLED).tolist()

    def remarks(position: int) -> tuple[str, tuple[str, ...]]:
        name = dataset.name(indices[position])
        try:
            with open_image(BytesIO(dataset.content(indices[position]))) as image:
                return name, decode_with_remarks(image, given).remarks
        except UnreadableImageError:  # reported when it is read
            return name, ()

    found = map_threads(remarks, len(indices), label="looking at images", show=False)
    least = max(1, round(_SHARE * len(indices)))
    own = [] if given.is_auto else [f"data.range={given}: values of more than 8 bits are mapped from it to 0..255"]
    return [*own, *format_remarks(found, f"{len(indices)} images looked at", least=least)]
