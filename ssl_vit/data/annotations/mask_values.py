"""Read which pixels of a mask file are foreground and which are void, whatever convention the file follows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_vit.data.sources.decode import open_image
from ssl_vit.runtime.errors import UserError

VOID = 255  # unlabeled pixels, as in PASCAL VOC
MAX_LABEL = 63  # largest label of a gray mask in which 255 is void; soft edges reach higher values
_MAX_COLORS = 64  # a file of more colors is a photograph or was compressed with losses
_GRAY_TOLERANCE = 16  # difference of the channels of a gray image after lossy compression
_LABEL_COHERENCE = 0.5  # least share of label pixels whose right neighbor has the same label; noise has less
_MAX_NOISE = 0.25  # of all pixels

Reading = Literal["binary", "soft", "labels", "values"]
Values = npt.NDArray[Any]  # (H, W)
BoolMask = npt.NDArray[np.bool_]  # (H, W)


class ForegroundMask(NamedTuple):
    """One mask as it was understood."""

    foreground: BoolMask
    void: BoolMask
    reading: Reading
    values: list[float]  # distinct values of the file, ascending


class StoredValues(NamedTuple):
    """The pixels of a mask file as one number each."""

    values: Values
    white: float  # the largest value that the file can have: 255, 65535, or 1 for floats
    is_index: bool  # indices of a palette or of few colors, in no order
    is_lossy: bool  # no value is exact

    @property
    def is_soft(self) -> bool:
        """Whether the values are shades between background and foreground, as after resizing or compression."""
        distinct = np.unique(self.values)
        if self.is_index or len(distinct) <= 2:
            return False
        others = distinct[(distinct != 0) & (distinct != self.white)]
        return bool(distinct[-1] > self.white / 2 and not self._has_labels(others))

    def _has_labels(self, others: Values) -> bool:
        """Return whether values between black and white are labels of regions: small, and not a few single pixels."""
        if others[-1] > MAX_LABEL:
            return False
        left, right = self.values[:, :-1], self.values[:, 1:]
        inside = np.isin(left, others)
        if not inside.any() or inside.mean() > _MAX_NOISE:
            return True
        return bool((right == left)[inside].mean() >= _LABEL_COHERENCE)


class FolderValues(NamedTuple):
    """What all masks of a folder have in common, for files that are ambiguous alone."""

    values: set[float]  # distinct values of all masks that are not soft
    has_soft: bool


def read_foreground(
    path: Path,
    folder: Callable[[], FolderValues],
    foreground: Collection[int] | None = None,
    void: Collection[int] = (),
) -> ForegroundMask:
    """Read the foreground and the void pixels of a mask.

    - With `foreground`, these values are foreground.
    - Two values: the larger one is foreground.
    - More than two that reach above half of white: a soft mask, cut in the middle (above 127 of 255). A JPEG always is.
    - Labels with 0: all others are foreground. 255 is void in palette files with other labels, and in gray files whose
      other labels are below 64.
    - One value, or two without 0, are compared with the values of the whole folder.
    - The alpha channel is the mask where the colors are not: one color everywhere, or a photograph.

    Args:
        path: The file.
        folder: Returns what all masks of the folder have in common; only called where it matters.
        foreground: Values of the foreground; all others but the void ones are background.
        void: Values that are neither.

    Raises:
        UnreadableImageError: The file cannot be read.
        UserError: The values do not tell which of them are foreground.
    """
    stored = read_values(path)
    distinct = [value.item() for value in np.unique(stored.values)]
    nothing = np.zeros(stored.values.shape, bool)

    def result(mask: BoolMask, reading: Reading, void: BoolMask = nothing) -> ForegroundMask:
        return ForegroundMask(mask & ~void, void, reading, distinct)

    if foreground is not None:
        return result(np.isin(stored.values, list(foreground)), "values", np.isin(stored.values, list(void)))
    above_half = stored.values > stored.white / 2
    if stored.is_lossy or stored.is_soft:
        return result(above_half, "soft")
    if distinct == [0]:
        return result(nothing, "binary")
    if distinct[-1] <= stored.white / 2 and not stored.is_index and folder().has_soft:
        return result(above_half, "soft")  # the noise of an empty mask
    if 0 in distinct and len(distinct) == 2:
        return result(stored.values == distinct[-1], "binary")
    if 0 not in distinct and 0 not in folder().values:
        if len(folder().values | set(distinct)) > 2:
            raise UserError(_explain_labels(path, stored))
        return result(stored.values == max(folder().values), "binary")
    return result(stored.values != 0, "labels" if len(distinct) > 2 else "binary", _void(stored, distinct))


def _void(stored: StoredValues, distinct: list[float]) -> BoolMask:
    others = [value for value in distinct if value not in (0, VOID)]
    has_void = bool(others) and (stored.is_index or max(others) <= MAX_LABEL)
    return np.equal(stored.values, VOID) & has_void


def _explain_labels(path: Path, stored: StoredValues) -> str:
    """Propose `mask_values` for labels without 0: most of the border is background, the rarest of three void."""
    values, counts = np.unique(stored.values, return_counts=True)
    rim = np.concatenate([stored.values[0], stored.values[-1], stored.values[:, 0], stored.values[:, -1]])
    background = max(values.tolist(), key=lambda value: int((rim == value).sum()))
    others = [int(value) for _, value in sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)]
    others.remove(int(background))
    inside, unclear = (others[:1], others[1:]) if len(others) == 2 else (sorted(others), [])
    shown = ", ".join(map(str, values.astype(int).tolist()[:8]))
    return (
        f"{path}: a mask with the values {shown} and without 0 does not tell what is foreground; name the values, for "
        f"example (by what lies at the border of this mask) 'mask_values={{foreground:{inside},void:{unclear}}}'"
    )


def read_values(path: Path) -> StoredValues:
    """Read the pixels of a mask as one number each: gray values, indices of a palette or of colors, or alpha.

    Raises:
        UnreadableImageError: The file cannot be read.
    """
    with open_image(path) as image:
        image.load()
        lossy = image.format == "JPEG"
        if image.mode == "P":
            gray = _gray_palette(image)
            return StoredValues(np.asarray(image), 255, True, False) if gray is None else _gray(gray)
        pixels = np.asarray(image)
        has_alpha = image.mode in ("LA", "RGBA", "PA", "La", "RGBa")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.ndim == 2:
        return _gray(pixels, lossy)
    if not has_alpha:
        return _from_colors(pixels, lossy)
    alpha, colors = pixels[..., -1], pixels[..., :-1]
    if alpha.min() == alpha.max():
        return _from_colors(colors, lossy)
    number = len(np.unique(colors.reshape(-1, colors.shape[-1]), axis=0))
    if number == 1 or number > _MAX_COLORS:
        return _gray(alpha)
    return _from_colors(np.where(alpha[..., None] > VOID // 2, colors, 0), lossy)


def _gray(values: Values, lossy: bool = False) -> StoredValues:
    top = values[np.isfinite(values)].max(initial=0)
    white = 1.0 if values.dtype.kind == "f" and top <= 1 else 255.0 if top <= 255 else 65535.0
    return StoredValues(np.nan_to_num(values), white, False, lossy)


def _gray_palette(image: Image.Image) -> Values | None:
    """Return the gray values (H, W) of a palette image that has only distinct shades of gray; else None."""
    indices = np.unique(np.asarray(image))
    palette = np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette[: len(stored)] = stored
    colors = palette[indices]
    is_gray = (
        len(indices) > 1 and bool((colors == colors[:, :1]).all()) and len(np.unique(colors[:, 0])) == len(indices)
    )
    return palette[np.asarray(image), 0] if is_gray else None


def _from_colors(colors: Values, lossy: bool) -> StoredValues:
    """Return gray values where all channels are (nearly) equal; else ranks of the colors by brightness, 0 for black."""
    spread = colors.max(-1).astype(np.int64) - colors.min(-1)
    if spread.max() <= (0 if colors.shape[-1] == 1 else _GRAY_TOLERANCE):
        exact = bool(spread.max() == 0)
        return _gray(colors.max(-1) if exact else colors.mean(-1).round(), lossy)
    distinct, ranks = np.unique(colors.reshape(-1, colors.shape[-1]), axis=0, return_inverse=True)
    if lossy or len(distinct) > _MAX_COLORS:
        return StoredValues(colors.max(-1), 255, False, True)
    order = distinct.astype(np.int64).sum(-1).argsort(kind="stable").argsort() + int(distinct[0].any())
    return StoredValues(order[ranks.reshape(colors.shape[:2])], 255, True, False)
