"""Read the pixels of a mask file as one number each, and tell labels of regions from shades of soft edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.decode import open_image, upright

VOID = 255  # unlabeled pixels, as in PASCAL VOC
MAX_LABEL = 63  # largest label of a gray mask in which 255 is void; soft edges reach higher values
NEAR = 0.1  # of the largest value: shades this close to black or white come from compression, not from an edge
_MAX_COLORS = 64  # a file of more colors is a photograph or was compressed with losses
_GRAY_TOLERANCE = 16  # difference of the channels of a gray image after lossy compression
_HUE_TOLERANCE = 0.3  # spread of a channel's share in the pixels of one color after lossy compression
_LABEL_COHERENCE = 0.5  # least share of label pixels whose right neighbor has the same label; noise has less
_SURE_COHERENCE = 0.9  # the same for more values than _FEW, as gradients have
_FEW = 16
_MAX_NOISE = 0.25  # of all pixels

Values = npt.NDArray[Any]  # (H, W)


class StoredValues(NamedTuple):
    """The pixels of a mask as one number each."""

    values: Values
    white: float  # the largest value that the file can have: 255, 65535, or 1 for floats
    is_index: bool  # indices of a palette or of few colors, in no order
    is_lossy: bool  # no value is exact
    background: tuple[int, ...] = (0,)  # of indices: those that are transparent, or the black one

    @property
    def is_soft(self) -> bool:
        """Whether the values are shades between background and foreground, as after resizing or compression.

        Labels fill regions, where most pixels equal their neighbors; soft edges are thin and noise is not coherent.
        """
        distinct = np.unique(self.values)
        if self.is_index or len(distinct) <= 2:
            return False
        top = distinct[-1]
        others = distinct[(distinct > 0) & (distinct < top)]
        between = others[(others > NEAR * top) & (others < (1 - NEAR) * top)]
        if len(between):
            coherence = self._coherence(between)
            return coherence < (_LABEL_COHERENCE if len(distinct) <= _FEW else _SURE_COHERENCE)
        if others[-1] > MAX_LABEL:
            return True
        if np.isin(self.values, others).mean() > _MAX_NOISE:
            return False
        return self._coherence(others) < _LABEL_COHERENCE

    def _coherence(self, chosen: Values) -> float:
        """Return the share of the pixels with these values whose right neighbor has the same value."""
        left, right = self.values[:, :-1], self.values[:, 1:]
        inside = np.isin(left, chosen)
        return float((right == left)[inside].mean()) if inside.any() else 1.0


def read_values(path: Path) -> StoredValues:
    """Read the pixels of a mask as one number each: gray values, indices of a palette or of colors, or alpha.

    EXIF orientation is applied, as to images.

    Raises:
        UnreadableImageError: The file cannot be read, or losses have mixed its colors.
    """
    with open_image(path) as opened:
        opened.load()
        lossy, image = opened.format == "JPEG", upright(opened)
        if image.mode == "P":
            gray = _gray_palette(image)
            indices = np.asarray(image)
            return StoredValues(indices, 255, True, False, _background(image)) if gray is None else _gray(gray)
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        pixels = np.asarray(image)
        has_alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.ndim == 2:
        return _gray(pixels, lossy)
    if not has_alpha:
        return _from_colors(pixels, lossy, path)
    alpha, colors = pixels[..., -1], pixels[..., :-1]
    if alpha.min() == alpha.max():
        return _from_colors(colors, lossy, path)
    number = len(np.unique(colors.reshape(-1, colors.shape[-1]), axis=0))
    if number == 1 or number > _MAX_COLORS:
        return _gray(alpha)
    return _from_colors(np.where(alpha[..., None] > alpha.max() / 2, colors, 0), lossy, path)


def _gray(values: Values, lossy: bool = False) -> StoredValues:
    top = values[np.isfinite(values)].max(initial=0)
    white = 1.0 if values.dtype.kind == "f" and top <= 1 else 255.0 if top <= 255 else 65535.0
    return StoredValues(np.nan_to_num(values), white, False, lossy)


def _gray_palette(image: Image.Image) -> Values | None:
    """Return the gray values (H, W) of a palette image that has only distinct shades of gray; else None."""
    indices, palette = np.unique(np.asarray(image)), _palette(image)
    colors = palette[indices]
    is_gray = (
        "transparency" not in image.info
        and len(indices) > 1
        and bool((colors == colors[:, :1]).all())
        and len(np.unique(colors[:, 0])) == len(indices)
    )
    return palette[np.asarray(image), 0] if is_gray else None


def _palette(image: Image.Image) -> Values:
    """Return the colors (256, 3) of a palette image."""
    palette = np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette[: len(stored)] = stored
    return palette


def _background(image: Image.Image) -> tuple[int, ...]:
    """Return the indices of a palette image's background: transparent ones, else the only black one, else 0."""
    used = np.unique(np.asarray(image)).tolist()
    transparency = image.info.get("transparency")
    if transparency is not None:
        alpha = [VOID] * 256
        if isinstance(transparency, bytes):
            alpha[: len(transparency)] = list(transparency)
        else:
            alpha[int(transparency)] = 0
        if transparent := [index for index in used if alpha[index] <= VOID // 2]:
            return tuple(transparent)
    black = [index for index in used if not _palette(image)[index].any()]
    return tuple(black) if len(black) == 1 else (0,)


def _from_colors(colors: Values, lossy: bool, path: Path) -> StoredValues:
    """Return gray values where all channels are (nearly) equal; else ranks of the colors by brightness, 0 for black."""
    spread = colors.max(-1).astype(np.int64) - colors.min(-1)
    if spread.max() <= (0 if colors.shape[-1] == 1 else _GRAY_TOLERANCE):
        exact = bool(spread.max() == 0)
        return _gray(colors.max(-1) if exact else colors.mean(-1).round(), lossy)
    distinct, ranks = np.unique(colors.reshape(-1, colors.shape[-1]), axis=0, return_inverse=True)
    if lossy or len(distinct) > _MAX_COLORS:
        brightness = colors.max(-1)
        visible = brightness > brightness.max() / 4  # darker pixels are noise
        bright = colors[visible] / brightness[visible][:, None]
        low, high = np.percentile(bright, [5, 95], axis=0)
        if (high - low).max() > _HUE_TOLERANCE:
            raise UnreadableImageError(path.name, "a mask of several colors that were compressed with losses")
        return StoredValues(brightness, 255, False, True)
    order = distinct.astype(np.int64).sum(-1).argsort(kind="stable").argsort() + int(distinct[0].any())
    return StoredValues(order[ranks.reshape(colors.shape[:2])], 255, True, False)
