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
    "gallery": "train",  # of re-identification
    "query": "test",
}
_FILLERS = frozenset(
    {
        "set",
        "sets",
        "split",
        "data",
        "dataset",
        "datasets",
        "daten",
        "images",
        "image",
        "imgs",
        "img",
        "folder",
        "samples",
    }
)
_VARIANTS = frozenset(
    {"old", "new", "all", "full", "small", "mini", "raw", "clean", "noisy", "aug", "augmented", "labeled", "labelled"}
)
_OTHER_SPLITS = frozenset({"unlabeled", "unlabelled", "extra", "fold", "trainval"})
_ANNOTATIONS = frozenset({"mask", "masks", "annotation", "annotations", "label", "labels", "gt", "groundtruth"})
# `traindata`, `testset`, `trainingsdaten`: a word for a split and a filler in one.
_COMPOUNDS = {
    compound: role
    for role in _ROLES
    for filler in _FILLERS
    for compound in (role + filler, f"{role}s{filler}", filler + role)
}
_MOST_COMPARED = 20  # folders whose subfolders are compared; splits are fewer


class FolderLayout(NamedTuple):
    """What the folders directly below a root are."""

    kind: Literal["classes", "splits", "unclear"]
    reason: str = ""  # why they are unclear, or what a user must know of them


def split_role(name: str) -> Role | None:
    """Return which split a folder name means, or None: `Train`, `training_set`, `val2017`, `test-images` are splits."""
    words = _words(name)
    return _ROLES.get(words[0]) if len(words) == 1 else None


def folder_layout(folders: Collection[str], subfolders: Callable[[str], Collection[str]]) -> FolderLayout:
    """Decide whether folders are splits or classes.

    They are splits if all of them (two or more) have names of splits, `masks` and `test_labels` aside, or such names
    with the same addition (`seg_train`, `seg_test`). A single name of a split among others (bus, car, train) is a
    class. Unclear are: several names of splits among others, names such as `train_a` or `fold1`, one name of a split
    where all folders have the same subfolders or where it alone has some, and classes that each contain splits.

    Args:
        folders: Names of the folders with images directly below the root.
        subfolders: Gives the names of the folders in one of them; empty if it has images of its own.
    """
    images = [name for name in folders if _ANNOTATIONS.isdisjoint(_words(name)[-1:])]
    alike = len({_addition(name) for name in images}) == 1 and set(_partners(images)) == set(images)
    if len(images) > 1 and (all(map(split_role, images)) or alike):
        return FolderLayout("splits")
    if len(folders) < 2:
        return FolderLayout("classes")
    roles = {role_in(name) for name in folders}
    similar = sorted({*filter(resembles_split, folders), *_partners(folders)})
    if len(roles) > 1 and None not in roles:
        similar = sorted(folders)
    if len(similar) > 1:
        return FolderLayout("unclear", f"{', '.join(similar[:4])} look like splits, and not all folders are understood")
    if len(folders) > _MOST_COMPARED:
        return FolderLayout("classes")
    inside = [set(subfolders(name)) for name in folders]
    equal = len(inside[0]) > 1 and all(names == inside[0] for names in inside)
    shown = ", ".join(sorted(inside[0])[:4])
    if similar and equal:
        return FolderLayout("unclear", f"{similar[0]} looks like a split, and all folders have the same subfolders")
    if similar and len(subfolders(similar[0])) > 1 and not all(inside):
        return FolderLayout("unclear", f"{similar[0]} looks like a split, and others have no subfolders")
    if len(inside[0]) > 1 and all(all(map(split_role, names or [""])) for names in inside):
        return FolderLayout("unclear", f"each folder contains splits ({shown})")
    return FolderLayout("classes", f"all of them have the same subfolders ({shown})" if equal else "")


def _partners(names: Collection[str]) -> list[str]:
    """Return the names that differ from another one in the word for the split alone: `seg_train` and `seg_test`."""
    roles: dict[str, set[Role]] = {}
    for name in names:
        if role := role_in(name):
            roles.setdefault(_addition(name), set()).add(role)
    return [name for name in names if role_in(name) and len(roles[_addition(name)]) > 1]


def role_in(name: str) -> Role | None:
    """Return which split a name with exactly one word for one means, whatever its other words but `masks`, `labels`."""
    words = _words(name)
    roles = [_ROLES[word] for word in words if word in _ROLES]
    return roles[0] if len(roles) == 1 and _ANNOTATIONS.isdisjoint(words[-1:]) else None


def _addition(name: str) -> str:
    return " ".join(word for word in _words(name) if word not in _ROLES)


def resembles_split(name: str) -> bool:
    """Return whether a name is that of a split, perhaps with an addition: `valid`, `train_b`, `fold3`, `unlabeled`."""
    words = _words(name)
    marks = [word for word in words if word in _ROLES or word in _OTHER_SPLITS]
    return len(marks) == 1 and all(len(word) == 1 or word in _VARIANTS for word in words if word not in marks)


def _words(name: str) -> list[str]:
    """Split a name into lower-case words without digits and fillers: `TrainSet_2017` gives `train`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [_COMPOUNDS.get(word, word) for word in re.findall(r"[^\W\d_]+", spaced.casefold())]
    return [word for word in words if word not in _FILLERS] or words
