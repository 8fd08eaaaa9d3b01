"""Find the mask file of each image by its name, and separate images from masks that share a folder."""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from ssl_vit.data.annotations.mask_pixels import read_values
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.image_folder import ImageFolder, scan_image_folder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.errors import UserError

_MARK = r"masks?|gt|groundtruth|ground[ _-]truth|seg|segmentation|labels?|annotations?|anno|matte|alpha|saliency|object"
_MARKED = re.compile(rf"^(?:(?:{_MARK})[ ._-]+)?(.+?)(?:[ ._-]+(?:{_MARK}))?$", re.IGNORECASE)
_SAMPLE = 8  # files whose content decides which of two files with one name is the mask
_MAX_VALUES = 64  # distinct values of a mask that is not soft
_EXTREME = 0.1  # of the range: the pixels of a soft mask are mostly this close to its lowest or highest value


class MaskPairs:
    """Mask files of a folder by image name.

    A mask has its image's relative name without the suffix (`x.png` for `x.jpg`), with it (`x.jpg.png`), or with a word
    such as `mask` or `gt` (`x_mask.png`, `gt-x.png`), in any case.

    Args:
        folder: Searched recursively.
        images: The images, if masks may be among them; never is a file its own mask.

    Raises:
        UserError: The folder does not exist or has no image.
    """

    def __init__(self, folder: Path, images: ImageFolder | None = None) -> None:
        if not folder.is_dir():
            raise UserError(f"masks={folder}: there is no such folder")
        self.folder = folder
        found = scan_image_folder(folder)
        names = [found.name(index) for index in range(len(found))]
        paths = [found.path(index) for index in range(len(found))]
        self._images = images
        own = {} if images is None else {images.path(index).resolve(): index for index in range(len(images))}
        shared = {index: own[real] for index, path in enumerate(paths) if (real := path.resolve()) in own}
        if images is not None and images.root.resolve().is_relative_to(folder.resolve()) and images.root != folder:
            kept = [index for index in range(len(paths)) if index not in shared]  # the images lie among the masks
            names, paths = [names[index] for index in kept], [paths[index] for index in kept]
        elif images is not None and shared:
            masks = _masks_among(names, paths, is_below=folder.resolve() != images.root.resolve())
            self._images = _without(images, {shared[index] for index in masks if index in shared})
            names, paths = [names[index] for index in masks], [paths[index] for index in masks]
        self._paths: dict[str, list[Path]] = defaultdict(list)
        for name, path in zip(names, paths, strict=True):
            self._paths[_stem(name)].append(path)
        self._marked: dict[str, list[Path]] = defaultdict(list)
        for stem, files in self._paths.items():
            self._marked[_unmarked(stem)] += files

    @property
    def images(self) -> ImageFolder:
        """The images without the masks among them."""
        assert self._images is not None
        return self._images

    @property
    def paths(self) -> list[Path]:
        """All mask files."""
        return [path for files in self._paths.values() for path in files]

    def find(self, name: str) -> Path:
        """Return the mask file of the image with this relative name.

        Raises:
            FileNotFoundError: There is none, or more than one; the text says which files are near.
        """
        stem, full = _stem(name), name.casefold()
        files = self._paths.get(stem) or self._paths.get(full) or self._marked.get(stem) or self._marked.get(full) or []
        if len(files) == 1:
            return files[0]
        if files:
            raise FileNotFoundError(f"several masks: {', '.join(sorted(file.name for file in files))}")
        near = difflib.get_close_matches(stem, self._paths, n=1)
        nearest = f"; the nearest is {self._paths[near[0]][0].relative_to(self.folder)}" if near else ""
        raise FileNotFoundError(f"no mask with this image's name{nearest}")

    def why_missing(self, name: str) -> str | None:
        """Return why the image with this relative name has no mask, or None if it has one."""
        try:
            self.find(name)
        except FileNotFoundError as error:
            return str(error)
        return None


def _masks_among(names: list[str], paths: list[Path], *, is_below: bool) -> list[int]:
    """Return the indices of the masks among files of images and masks.

    Raises:
        UserError: The files of one name do not differ in what they contain.
    """
    if is_below:  # the masks have a folder of their own among the images
        return list(range(len(names)))
    by_stem: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        by_stem[_stem(name)].append(index)
    stems = by_stem.keys() | {name.casefold() for name in names}
    marked = [index for index, name in enumerate(names) if _base(_stem(name)) in stems]
    twins = [group for group in by_stem.values() if len(group) > 1]
    suffixes = defaultdict(list)
    for group in twins:
        for index in group:
            suffixes[paths[index].suffix.lower()].append(paths[index])
    of_masks = {suffix for suffix, files in suffixes.items() if all(map(_resembles_mask, files[:_SAMPLE]))}
    images_of = {
        len([index for index in group if paths[index].suffix.lower() not in of_masks]): group for group in twins
    }
    unclear = next((group for count, group in images_of.items() if count != 1), None)
    if unclear is not None:
        raise UserError(
            "images and masks are in one folder, and it is not clear which is the mask of "
            f"{', '.join(names[index] for index in unclear)}: put the masks into a folder of their own"
        )
    if not twins and not marked:
        raise UserError("images and masks name one folder, in which no two files belong together by name")
    return sorted({*marked, *(index for group in twins for index in group if paths[index].suffix.lower() in of_masks)})


def _resembles_mask(path: Path) -> bool:
    """Return whether a file has few values, or mostly values near its lowest and highest."""
    try:
        stored = read_values(path)
    except UnreadableImageError:
        return False
    low, high = float(stored.values.min()), float(stored.values.max())
    if stored.is_index or len(np.unique(stored.values)) <= _MAX_VALUES:
        return True
    margin = _EXTREME * (high - low)
    return bool(((stored.values <= low + margin) | (stored.values >= high - margin)).mean() > 1 - _EXTREME)


def _without(images: ImageFolder, masks: set[int]) -> ImageFolder:
    kept = (name for index, name in enumerate(images.names) if index not in masks)
    return images.with_names(PackedPaths.from_iterable(kept))


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")).casefold()


def _unmarked(stem: str) -> str:
    """Return a path without a word such as `mask` at the start or end of the file's name."""
    folder, name = os.path.split(stem)
    match = _MARKED.match(name)
    return os.path.join(folder, match[1] if match else name)  # noqa: PTH118 - a name of an image


def _base(stem: str) -> str | None:
    """Return the name of the image that a mask's name derives from, or None if it is not derived."""
    if PurePosixPath(stem).suffix:
        return stem  # x.jpg of x.jpg.png
    unmarked = _unmarked(stem)
    return None if unmarked == stem else unmarked
