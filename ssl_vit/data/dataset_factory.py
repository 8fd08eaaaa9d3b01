"""From the data section of a configuration to datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.pretrain import Source
from ssl_vit.data.dataset import ImageDataset, escape_path
from ssl_vit.data.sources.image_folder import ImageFolder, read_image_list, scan_image_folder
from ssl_vit.data.sources.tar_shards import TarShardDataset, load_shards
from ssl_vit.data.sources.torchvision_datasets import load_torchvision_dataset
from ssl_vit.runtime.errors import UserError


class TrainTestSplit(NamedTuple):
    """Labeled images to learn from and to test on; `test` is None where there is but one set."""

    train: ImageDataset
    test: ImageDataset | None


def build_dataset(source: Source, root: Path) -> ImageDataset:
    """The images to pretrain on, or to look at.

    Args:
        source: What kind of thing `root` is.
        root: A folder (flat, nested, or with class folders), a list file, a folder of shards, or the folder of a
            torchvision data set.

    Raises:
        UserError: There is nothing of that kind, or no image in it.
    """
    if source == "folder":
        return scan_image_folder(root)
    if source == "list":
        return read_image_list(root)
    if source == "shards":
        return load_shards(root)
    return load_torchvision_dataset(source, root, split="pretrain")


def build_labeled_splits(data: EvalDataConfig) -> TrainTestSplit:
    """The labeled images of an evaluation.

    `data.root` is the folder of a torchvision data set; or holds `train/` and `val/` or `test/`, each with class
    folders or shards; or holds these only. Or `data.train` and `data.test` name two such folders.

    Raises:
        UserError: There is no image, there are no class folders, or the two sets have different classes.
    """
    if data.source == "list":
        raise UserError("data.source=list: a list has no labels; for an evaluation use class folders")
    find: Callable[[Path], ImageFolder | TarShardDataset]
    if data.source == "folder":
        find = _labeled
    elif data.source == "shards":
        find = _labeled_shards
    else:
        if data.root is None:
            raise UserError(f"data.source={data.source}: name the folder above its files with data.root")
        train = load_torchvision_dataset(data.source, data.root, split="train")
        return TrainTestSplit(train, load_torchvision_dataset(data.source, data.root, split="test"))
    if data.root is not None:
        return _found(find, *_split_folders(data.root, "data.train={train} data.test={val}"))
    assert data.train is not None  # the configuration demands one of them
    return _found(find, data.train, data.test)


def build_labeled_folder_splits(root: Path) -> TrainTestSplit:
    """The labeled images of a folder with class folders, or with `train/` and `val/` or `test/` that hold these.

    Raises:
        UserError: As `build_labeled_splits`.
    """
    return _found(_labeled, *_split_folders(root, "online.root={train}"))


def _found(
    find: Callable[[Path], ImageFolder | TarShardDataset], train_folder: Path, test_folder: Path | None
) -> TrainTestSplit:
    train = find(train_folder)
    if test_folder is None:
        return TrainTestSplit(train, None)
    test = find(test_folder)
    if train.classes != test.classes:
        raise UserError(_different(train, test))
    return TrainTestSplit(train, test)


def build_feature_splits(data: EvalDataConfig) -> TrainTestSplit:
    """The images whose features are wanted: as in an evaluation, but they need no labels; lists will do, too.

    Raises:
        UserError: There is no image, or the two sets have different classes.
    """
    if data.source not in ("folder", "list", "shards"):
        return build_labeled_splits(data)
    if data.root is not None:
        train_folder, test_folder = _split_folders(data.root, "data.train={train} data.test={val}")
    else:
        assert data.train is not None  # the configuration demands one of them
        train_folder, test_folder = data.train, data.test
    train = build_dataset(data.source, train_folder)
    test = None if test_folder is None else build_dataset(data.source, test_folder)
    if test is not None and train.classes != test.classes:
        raise UserError("the two sets have different classes; describe each by a command of its own: data.train=...")
    return TrainTestSplit(train, test)


def _split_folders(root: Path, choice: str) -> tuple[Path, Path | None]:
    """The folder to learn from, and the one to test on if there is one; `choice` are words that name them."""
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        return root, None
    if len(tests) == 2:
        words = choice.format(**{name: escape_path(root / name) for name in ("train", "val")})
        raise UserError(f"{escape_path(root)} holds val/ and test/: choose one, as with {words}")
    return root / "train", tests[0]


def _labeled(folder: Path) -> ImageFolder:
    dataset = scan_image_folder(folder)
    if len(dataset.classes) < 2:
        names = map(dataset.name, range(len(dataset)))
        stray = next((name for name in names if "/" not in name), None)
        found = f"{stray} lies in none" if stray else f"all images lie in {dataset.name(0).partition('/')[0]}/"
        raise UserError(f"{escape_path(folder)}: labels are the names of two or more class folders, and {found}")
    return dataset


def _labeled_shards(folder: Path) -> TarShardDataset:
    dataset = load_shards(folder)
    if len(dataset.classes) < 2:
        raise UserError(
            f"{escape_path(folder)}: labels are the numbers of two or more classes in the shards' .cls members, and "
            f"{'all dataset are of one' if dataset.classes else 'not every image has one'}"
        )
    return dataset


def _different(train: ImageFolder | TarShardDataset, test: ImageFolder | TarShardDataset) -> str:
    parts = [
        f"only in {escape_path(one.root)}: {', '.join(sorted(set(one.classes) - set(other.classes)))}"
        for one, other in ((train, test), (test, train))
        if set(one.classes) - set(other.classes)
    ]
    return f"the classes to learn from and to test on differ; {'; '.join(parts)}"
