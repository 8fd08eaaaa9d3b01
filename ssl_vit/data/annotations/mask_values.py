"""Read which pixels of a mask file are foreground and which are void, whatever convention the file follows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ssl_vit.data.annotations.mask_pixels import MAX_LABEL, NEAR, VOID, StoredValues, read_values
from ssl_vit.runtime.errors import UserError

_MIN_CONTRAST = 32 / 255  # of white: what is darker in all files of a folder with losses is noise

Reading = Literal["binary", "soft", "labels", "values"]
BoolMask = npt.NDArray[np.bool_]  # (H, W)


class ForegroundMask(NamedTuple):
    """One mask as it was understood."""

    foreground: BoolMask
    void: BoolMask
    reading: Reading
    values: list[float]  # distinct values of the file, ascending


class FolderValues(NamedTuple):
    """What all masks of a folder have in common, for files that are ambiguous alone."""

    values: set[float]  # distinct values of all masks that are not soft
    has_soft: bool
    top: dict[float, float]  # largest value of the soft masks, by the largest that their files can have


class FolderLookup(NamedTuple):
    """What is known of the other masks of a folder, read when it is asked for."""

    all: Callable[[], FolderValues]
    has_void: Callable[[], bool]  # whether 255 is void in some of the masks, of which a sample is read


def read_foreground(
    path: Path,
    folder: FolderLookup,
    foreground: Collection[int] | None = None,
    void: Collection[int] = (),
) -> ForegroundMask:
    """Read the foreground and the void pixels of a mask.

    - With `foreground`, these values are foreground.
    - Two values: the larger one is foreground.
    - More than two that are shades of thin edges: a soft mask, cut in the middle: above 127 of 255, or above half of
      the largest value where no mask of the folder comes near white. A JPEG always is one.
    - Labels with 0: all others are foreground. 255 is void in palette files with other labels, and in gray files whose
      other labels are below 64; beside larger labels it may be an object, too, and has to be named.
    - In a palette the transparent colors are background, or else the only black one, or else index 0.
    - One value, or two without 0, are compared with the values of the whole folder.
    - The alpha channel is the mask where the colors are not: one color everywhere, or a photograph.

    Args:
        path: The file.
        folder: The other masks of the folder; only read where it matters.
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
    if stored.is_lossy or stored.is_soft:
        return result(stored.values > _cut(stored, folder, path), "soft")
    stored = _background_as_zero(stored)
    distinct = [value.item() for value in np.unique(stored.values)]
    if distinct[-1] <= stored.white / 2 and not stored.is_index and folder.all().has_soft:
        return result(stored.values > _cut(stored, folder, path), "soft")  # the noise of an empty mask
    if (
        len(distinct) > 2
        and VOID in distinct
        and not stored.is_index
        and any(MAX_LABEL < value < VOID for value in distinct)
    ):
        raise UserError(_explain_white(path, distinct))
    if distinct == [0, VOID] and not stored.is_index and folder.has_void():
        return result(nothing, "labels", stored.values == VOID)
    if 0 in distinct and len(distinct) <= 2:
        return result(stored.values == distinct[-1] if len(distinct) > 1 else nothing, "binary")
    if 0 not in distinct and 0 not in folder.all().values:
        if len(folder.all().values | set(distinct)) > 2:
            raise UserError(_explain_labels(path, stored))
        return result(stored.values == max(folder.all().values), "binary")
    return result(stored.values != 0, "labels" if len(distinct) > 2 else "binary", _void(stored, distinct))


def _cut(stored: StoredValues, folder: FolderLookup, path: Path) -> float:
    """Return the value above which a soft mask is foreground.

    Raises:
        UserError: All masks of the folder are so dark that losses may have made them.
    """
    top, white = float(stored.values.max()), stored.white
    if top < (1 - NEAR) * white:
        top = max(top, folder.all().top.get(white, 0.0))
    if stored.is_lossy and top < _MIN_CONTRAST * white:
        raise UserError(
            f"{path}: the brightest pixel of all such masks is {top:g} of {white:g}: save them without losses"
        )
    return white / 2 if top >= (1 - NEAR) * white else top / 2


def _background_as_zero(stored: StoredValues) -> StoredValues:
    """Return indices in which 0 is the background, and 256 what had the index 0."""
    if not stored.is_index or stored.background == (0,):
        return stored
    values = np.where(stored.values == 0, VOID + 1, stored.values.astype(np.int64))
    return stored._replace(values=np.where(np.isin(stored.values, stored.background), 0, values), background=(0,))


def _explain_white(path: Path, distinct: list[float]) -> str:
    """Propose `mask_values` for labels beside white, which may be an object, or void, or the others unknown."""
    others = [int(value) for value in distinct if value not in (0, VOID)]
    shown = ", ".join(f"{value:g}" for value in distinct[:8])
    return (
        f"{path}: a mask with regions of the values {shown} does not tell what {', '.join(map(str, others[:4]))} and "
        f"255 are; name the values: for a trimap 'mask_values={{foreground:[255],void:{others}}}', for labels "
        f"'mask_values={{foreground:{others},void:[255]}}' or 'mask_values={{foreground:{[*others, VOID]},void:[]}}'"
    )


def has_void(stored: StoredValues) -> bool:
    """Return whether a mask has labels beside a 255 that is void."""
    distinct = [value.item() for value in np.unique(stored.values)]
    is_plain = not stored.is_index and not stored.is_lossy and not stored.is_soft
    return is_plain and 0 in distinct and bool(_void(stored, distinct).any())


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
