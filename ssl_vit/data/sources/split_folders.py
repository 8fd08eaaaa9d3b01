"""Distinguish folders of splits (train/, valid/, Test/) from class folders, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

Role = Literal["train", "val", "test"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "heldout"), "test"),
}
_FILLERS = frozenset(
    {"set", "sets", "split", "data", "dataset", "datasets", "images", "image", "imgs", "img", "folder", "samples"}
)
_VARIANTS = frozenset(
    {"old", "new", "all", "full", "small", "mini", "raw", "clean", "noisy", "aug", "augmented", "labeled", "labelled"}
)
_OTHER_SPLITS = frozenset({"unlabeled", "unlabelled", "extra", "fold", "trainval"})
_ANNOTATIONS = frozenset({"mask", "masks", "annotation", "annotations", "label", "labels", "gt", "groundtruth"})
_MOST_COMPARED = 20  # folders whose subfolders are compared; splits are fewer


class FolderLayout(NamedTuple):
    """What the folders directly below a root are."""

    kind: Literal["classes", "splits", "unclear"]
    reason: str = ""  # for "unclear"


def split_role(name: str) -> Role | None:
    """Return which split a folder name means, or None: `Train`, `training_set`, `val2017`, `test-images` are splits."""
    words = _words(name)
    return _ROLES.get(words[0]) if len(words) == 1 else None


def folder_layout(folders: Collection[str], subfolders: Callable[[str], Collection[str]]) -> FolderLayout:
    """Decide whether folders are splits or classes.

    They are splits if all of them (two or more) have names of splits, `masks` and `test_labels` aside. A single name
    of a split among others (bus, car, train) is a class. Unclear are: several names of splits among others, names such
    as `train_a` or `fold1`, one name of a split where all folders have the same subfolders, and classes that each
    contain splits.

    Args:
        folders: Names of the folders with images directly below the root.
        subfolders: Gives the names of the folders in one of them; empty if it has images of its own.
    """
    images = [name for name in folders if _ANNOTATIONS.isdisjoint(_words(name)[-1:])]
    if len(images) > 1 and all(map(split_role, images)):
        return FolderLayout("splits")
    if len(folders) < 2:
        return FolderLayout("classes")
    similar = sorted(name for name in folders if resembles_split(name))
    if len(similar) > 1:
        return FolderLayout("unclear", f"{', '.join(similar[:4])} look like splits, and not all folders are understood")
    if len(folders) > _MOST_COMPARED and similar:
        return FolderLayout("classes")
    first = set(subfolders(next(iter(folders))))
    if similar and len(first) > 1 and all(set(subfolders(name)) == first for name in folders):
        return FolderLayout("unclear", f"{similar[0]} looks like a split, and all folders have the same subfolders")
    if len(first) > 1 and all(all(map(split_role, subfolders(name) or [""])) for name in folders):
        return FolderLayout("unclear", f"each folder contains splits ({', '.join(sorted(first))})")
    return FolderLayout("classes")


def resembles_split(name: str) -> bool:
    """Return whether a name is that of a split, perhaps with an addition: `valid`, `train_b`, `fold3`, `unlabeled`."""
    words = _words(name)
    marks = [word for word in words if word in _ROLES or word in _OTHER_SPLITS]
    return len(marks) == 1 and all(len(word) == 1 or word in _VARIANTS for word in words if word not in marks)


def _words(name: str) -> list[str]:
    """Split a name into lower-case words without digits and fillers: `TrainSet_2017` gives `train`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [re.sub(r"sets?$", "", word) or word for word in re.findall(r"[^\W\d_]+", spaced.casefold())]
    return [word for word in words if word not in _FILLERS] or words
