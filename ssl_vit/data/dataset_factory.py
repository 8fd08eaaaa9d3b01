"""Build datasets and train/test splits from the data section of a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.pretrain import Source
from ssl_vit.config.types import ValueRange
from ssl_vit.data.dataset import ImageDataset, escape_path
from ssl_vit.data.sources.file_kinds import EXTENSIONS
from ssl_vit.data.sources.image_folder import read_image_list, scan_image_folder
from ssl_vit.data.sources.image_index import is_hidden
from ssl_vit.data.sources.split_folders import folder_layout, role_in
from ssl_vit.data.sources.tar_shards import load_shards
from ssl_vit.data.sources.torchvision_datasets import load_torchvision_dataset
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.text import truncate_list

log = logging.getLogger(__name__)


class TrainTestSplit(NamedTuple):
    """Train and test images; `test` is None if there is only one set."""

    train: ImageDataset
    test: ImageDataset | None

    def with_range(self, value_range: ValueRange) -> TrainTestSplit:
        """Set the range of values of both, in place, and return the split."""
        for part in self:
            if part is not None:
                part.with_range(value_range)
        return self


def build_dataset(source: Source, root: Path) -> ImageDataset:
    """Build a dataset for pretraining or inspection.

    `root` is a folder (flat, nested, or with class folders), a list file, a folder of shards, or the folder of a
    torchvision dataset.

    Raises:
        UserError: `root` is missing, of another kind, or without images.
    """
    if source == "folder":
        return scan_image_folder(root)
    if source == "list":
        return read_image_list(root)
    if source == "shards":
        return load_shards(root)
    return load_torchvision_dataset(source, root, split="pretrain")


def build_labeled_splits(data: EvalDataConfig) -> TrainTestSplit:
    """Build the labeled images of an evaluation.

    `data.root` is the folder of a torchvision dataset, or contains `train/` and `val/` or `test/`, each with class
    folders or shards, or is one such set itself. Alternatively, `data.train` and `data.test` are two such sets.

    Raises:
        UserError: There are no images or no labels, or the two sets have different classes.
    """
    if data.source == "list":
        raise UserError("data.source=list: a list has no labels; for an evaluation use class folders")
    return _build_splits(data, _build_labeled)


def build_feature_splits(data: EvalDataConfig) -> TrainTestSplit:
    """Build the images of a feature extraction: as for an evaluation, but labels are optional and lists are allowed.

    Raises:
        UserError: There are no images, or the two sets have different classes.
    """
    return _build_splits(data, build_dataset)


def build_labeled_folder_splits(root: Path) -> TrainTestSplit:
    """Build the labeled images of a folder with class folders, or with `train/` and `val/` or `test/` that have them.

    Raises:
        UserError: As `build_labeled_splits`.
    """
    train, test = _find_split_folders(root, "online.root={train}")
    return _align_classes(_build_labeled("folder", train), None if test is None else _build_labeled("folder", test))


def _build_splits(data: EvalDataConfig, build: Callable[[Source, Path], ImageDataset]) -> TrainTestSplit:
    if data.source == "folder" or data.source == "list" or data.source == "shards":
        train, test = data.train, data.test
        if data.root is not None:
            train, test = _find_split_folders(data.root, "data.train={train} data.test={test}")
        assert train is not None  # the config requires one of them
        _check_disjoint(train, test)
        return _align_classes(build(data.source, train), None if test is None else build(data.source, test))
    if data.root is None:
        raise UserError(f"data.source={data.source}: name the folder above its files with data.root")
    train_set = load_torchvision_dataset(data.source, data.root, split="train")
    return TrainTestSplit(train_set, load_torchvision_dataset(data.source, data.root, split="test"))


def _check_disjoint(train: Path, test: Path | None) -> None:
    """Check that the test images are not training images by the place of their folders.

    Raises:
        UserError: One folder is the other one, or lies in it.
    """
    if test is None:
        return
    one, other = train.resolve(), test.resolve()
    if one == other or one.is_relative_to(other) or other.is_relative_to(one):
        found = "are the same folder" if one == other else "lie in one another"
        raise UserError(
            f"data.train={escape_path(train)} and data.test={escape_path(test)} {found}, so that test images would be "
            "training images; with one folder alone, data.root=FOLDER, images are held out"
        )


def _find_split_folders(root: Path, override: str) -> tuple[Path, Path | None]:
    """Return the folders of the train and test images below a folder, or the folder alone if it has no splits.

    Raises:
        UserError: It is not clear which folder is which; `override` gives the keys that name them.
    """
    if not root.is_dir():
        return root, None
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not is_hidden(os.fsencode(folder.name)))
    names = [folder.name for folder in folders]
    if any(map(role_in, names)):  # only then is it worth looking into them
        names = [folder.name for folder in folders if _has_images(folder)]
    layout = folder_layout(names, lambda name: _subfolders(root / name))
    if layout.kind == "classes":
        if layout.reason:
            keys = override.format(train=root / "FOLDER", test=root / "FOLDER")
            found = f"{', '.join(truncate_list(names, 4))} are taken for the classes, and {layout.reason}"
            log.warning(
                f"{escape_path(root)}: {escape_path(found)}; if these are the classes, name {escape_path(keys)}"
            )
        return root, None
    by_role = {role: [root / name for name in names if role_in(name) == role] for role in ("train", "val", "test")}
    train, tests = by_role["train"], by_role["val"] + by_role["test"]
    if layout.kind == "splits" and len(train) == len(tests) == 1:
        return train[0], tests[0]
    found = layout.reason or f"it holds {', '.join(f'{name}/' for name in names)}"
    first, second = (escape_path((group or [root / "FOLDER"])[0]) for group in (train, tests))
    raise UserError(
        f"{escape_path(root)}: the train and test images are not clear: {escape_path(found)}; name them with "
        f"{override.format(train=first, test=second)}"
    )


def _has_images(folder: Path) -> bool:
    """Return whether there is an image, a tar file or a link to a folder anywhere below a folder."""
    for _, subfolders, files in os.walk(folder):
        if any(Path(name).suffix.lower() in EXTENSIONS | {".tar"} for name in files):
            return True
        subfolders[:] = [name for name in subfolders if not is_hidden(os.fsencode(name))]
    return False


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder; none if it has images of its own."""
    entries = [entry for entry in folder.iterdir() if not is_hidden(os.fsencode(entry.name))]
    if any(entry.suffix.lower() in EXTENSIONS and entry.is_file() for entry in entries):
        return []
    return [entry.name for entry in entries if entry.is_dir()]


def _build_labeled(source: Source, folder: Path) -> ImageDataset:
    dataset = build_dataset(source, folder)
    if len(dataset.classes) >= 2:
        return dataset
    if source == "shards":
        rule = "the class numbers in .cls members"
        found = "all images are of one class" if dataset.classes else "not every image has one"
    else:
        rule = "the names of two or more class folders"
        stray = next((name for name in map(dataset.name, range(len(dataset))) if "/" not in name), None)
        only = dataset.name(0).partition("/")[0]
        found = f"{stray} lies in none" if stray else f"all images lie in {only}/; perhaps name that folder"
    raise UserError(f"{escape_path(folder)}: labels are {rule}, and {found}")


def _align_classes(train: ImageDataset, test: ImageDataset | None) -> TrainTestSplit:
    """Return the split with the labels of the train images, some of which the test images may lack.

    Raises:
        UserError: There are test images of other classes, or only one of the sets has labels.
    """
    if test is None or train.classes == test.classes:
        return TrainTestSplit(train, test)
    extra = [name for name in test.classes if name not in train.classes]
    if extra or not test.classes:
        found = f"only in test: {', '.join(truncate_list(extra, 8))}" if extra else "the test images have no labels"
        missing = [name for name in train.classes if name not in test.classes]
        only = f"; only in train: {', '.join(truncate_list(missing, 8))}" if extra and missing else ""
        raise UserError(f"the train and test images have different classes; {found}{only}")
    label_of = torch.tensor([train.classes.index(name) for name in test.classes])
    test.labels, test.classes = label_of[test.labels], train.classes
    return TrainTestSplit(train, test)
