"""Build datasets and train/test splits from the data section of a config."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.pretrain import Source
from ssl_vit.data.dataset import ImageDataset, escape_path
from ssl_vit.data.sources.image_folder import ImageFolder, read_image_list, scan_image_folder
from ssl_vit.data.sources.tar_shards import TarShardDataset, load_shards
from ssl_vit.data.sources.torchvision_datasets import ArraySource, load_torchvision_dataset
from ssl_vit.runtime.errors import UserError


class TrainTestSplit(NamedTuple):
    """Train and test images; `test` is None if there is only one set."""

    train: ImageDataset
    test: ImageDataset | None


def build_dataset(source: Source, root: Path) -> ImageDataset:
    """Build a dataset for pretraining or inspection.

    Args:
        source: The kind of `root`.
        root: A folder (flat, nested, or with class folders), a list file, a folder of shards, or the folder of a
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
    if data.source == "folder" or data.source == "shards":
        load = _load_labeled_folder if data.source == "folder" else _load_labeled_shards
        train, test = _split_roots(data)
        return _checked(load(train), None if test is None else load(test))
    return _torchvision_splits(data.source, data.root)


def build_feature_splits(data: EvalDataConfig) -> TrainTestSplit:
    """Build the images of a feature extraction: as for an evaluation, but labels are optional and lists are allowed.

    Raises:
        UserError: There are no images, or the two sets have different classes.
    """
    if data.source == "folder" or data.source == "list" or data.source == "shards":
        train, test = _split_roots(data)
        return _checked(build_dataset(data.source, train), None if test is None else build_dataset(data.source, test))
    return _torchvision_splits(data.source, data.root)


def build_labeled_folder_splits(root: Path) -> TrainTestSplit:
    """Build the labeled images of a folder with class folders, or with `train/` and `val/` or `test/` that have them.

    Raises:
        UserError: As `build_labeled_splits`.
    """
    train, test = _find_split_folders(root, "online.root={train}")
    return _checked(_load_labeled_folder(train), None if test is None else _load_labeled_folder(test))


def _torchvision_splits(source: ArraySource, root: Path | None) -> TrainTestSplit:
    if root is None:
        raise UserError(f"data.source={source}: name the folder above its files with data.root")
    train = load_torchvision_dataset(source, root, split="train")
    return TrainTestSplit(train, load_torchvision_dataset(source, root, split="test"))


def _split_roots(data: EvalDataConfig) -> tuple[Path, Path | None]:
    """Return the folders of the train images and, if there are any, of the test images."""
    if data.root is not None:
        return _find_split_folders(data.root, "data.train={train} data.test={val}")
    assert data.train is not None  # the config requires one of them
    return data.train, data.test


def _find_split_folders(root: Path, override: str) -> tuple[Path, Path | None]:
    """Return `train/` and `val/` or `test/` below a folder, or the folder alone; `override` selects between both."""
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        return root, None
    if len(tests) == 2:
        example = override.format(**{name: escape_path(root / name) for name in ("train", "val")})
        raise UserError(f"{escape_path(root)} has both val/ and test/; choose one, for example {example}")
    return root / "train", tests[0]


def _load_labeled_folder(folder: Path) -> ImageFolder:
    dataset = scan_image_folder(folder)
    if len(dataset.classes) < 2:
        names = map(dataset.name, range(len(dataset)))
        stray = next((name for name in names if "/" not in name), None)
        found = f"{stray} lies in none" if stray else f"all images lie in {dataset.name(0).partition('/')[0]}/"
        raise UserError(f"{escape_path(folder)}: labels are the names of two or more class folders, and {found}")
    return dataset


def _load_labeled_shards(folder: Path) -> TarShardDataset:
    dataset = load_shards(folder)
    if len(dataset.classes) < 2:
        found = "all images are of one class" if dataset.classes else "not every image has one"
        raise UserError(f"{escape_path(folder)}: labels are the class numbers in .cls members, and {found}")
    return dataset


def _checked(train: ImageDataset, test: ImageDataset | None) -> TrainTestSplit:
    """Return the split, unless its sets have different classes."""
    if test is not None and train.classes != test.classes:
        pairs = (("train", train, test), ("test", test, train))
        only = {name: sorted(set(own.classes) - set(other.classes)) for name, own, other in pairs}
        differences = "; ".join(f"only in {name}: {', '.join(classes)}" for name, classes in only.items() if classes)
        raise UserError(f"the train and test images have different classes; {differences}")
    return TrainTestSplit(train, test)
