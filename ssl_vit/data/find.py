"""From the data section of a configuration to sets of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ssl_vit.config import Source
from ssl_vit.config_evaluation import EvalDataConfig
from ssl_vit.data.arrays import array_pictures
from ssl_vit.data.files import FilePictures, folder_pictures, listed_pictures
from ssl_vit.data.pictures import Pictures, printable
from ssl_vit.data.shards import ShardPictures, shard_pictures
from ssl_vit.errors import UserError


class LabelledSplit(NamedTuple):
    """Labelled pictures to learn from and to test on; `test` is None where there is but one set."""

    train: Pictures
    test: Pictures | None


def find_pictures(source: Source, root: Path) -> Pictures:
    """The pictures to pretrain on, or to look at.

    Args:
        source: What kind of thing `root` is.
        root: A folder (flat, nested, or with class folders), a list file, a folder of shards, or the folder of a
            torchvision data set.

    Raises:
        UserError: There is nothing of that kind, or no picture in it.
    """
    if source == "folder":
        return folder_pictures(root)
    if source == "list":
        return listed_pictures(root)
    if source == "shards":
        return shard_pictures(root)
    return array_pictures(source, root, split="pretrain")


def find_labelled(data: EvalDataConfig) -> LabelledSplit:
    """The labelled pictures of an evaluation.

    `data.root` is the folder of a torchvision data set; or holds `train/` and `val/` or `test/`, each with class
    folders or shards; or holds these only. Or `data.train` and `data.test` name two such folders.

    Raises:
        UserError: There is no picture, there are no class folders, or the two sets have different classes.
    """
    if data.source == "list":
        raise UserError("data.source=list: a list has no labels; for an evaluation use class folders")
    find: Callable[[Path], FilePictures | ShardPictures]
    if data.source == "folder":
        find = _labelled
    elif data.source == "shards":
        find = _labelled_shards
    else:
        if data.root is None:
            raise UserError(f"data.source={data.source}: name the folder above its files with data.root")
        train = array_pictures(data.source, data.root, split="train")
        return LabelledSplit(train, array_pictures(data.source, data.root, split="test"))
    if data.root is not None:
        return _found(find, *_split_folders(data.root, "data.train={train} data.test={val}"))
    assert data.train is not None  # the configuration demands one of them
    return _found(find, data.train, data.test)


def labelled_folder(root: Path) -> LabelledSplit:
    """The labelled pictures of a folder with class folders, or with `train/` and `val/` or `test/` that hold these.

    Raises:
        UserError: As `find_labelled`.
    """
    return _found(_labelled, *_split_folders(root, "online.root={train}"))


def _found(
    find: Callable[[Path], FilePictures | ShardPictures], train_folder: Path, test_folder: Path | None
) -> LabelledSplit:
    train = find(train_folder)
    if test_folder is None:
        return LabelledSplit(train, None)
    test = find(test_folder)
    if train.classes != test.classes:
        raise UserError(_different(train, test))
    return LabelledSplit(train, test)


def find_described(data: EvalDataConfig) -> LabelledSplit:
    """The pictures whose features are wanted: as in an evaluation, but they need no labels; lists will do, too.

    Raises:
        UserError: There is no picture, or the two sets have different classes.
    """
    if data.source not in ("folder", "list", "shards"):
        return find_labelled(data)
    if data.root is not None:
        train_folder, test_folder = _split_folders(data.root, "data.train={train} data.test={val}")
    else:
        assert data.train is not None  # the configuration demands one of them
        train_folder, test_folder = data.train, data.test
    train = find_pictures(data.source, train_folder)
    test = None if test_folder is None else find_pictures(data.source, test_folder)
    if test is not None and train.classes != test.classes:
        raise UserError("the two sets have different classes; describe each by a command of its own: data.train=...")
    return LabelledSplit(train, test)


def _split_folders(root: Path, choice: str) -> tuple[Path, Path | None]:
    """The folder to learn from, and the one to test on if there is one; `choice` are words that name them."""
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        return root, None
    if len(tests) == 2:
        words = choice.format(**{name: printable(root / name) for name in ("train", "val")})
        raise UserError(f"{printable(root)} holds val/ and test/: choose one, as with {words}")
    return root / "train", tests[0]


def _labelled(folder: Path) -> FilePictures:
    pictures = folder_pictures(folder)
    if len(pictures.classes) < 2:
        names = map(pictures.name, range(len(pictures)))
        stray = next((name for name in names if "/" not in name), None)
        found = f"{stray} lies in none" if stray else f"all pictures lie in {pictures.name(0).partition('/')[0]}/"
        raise UserError(f"{printable(folder)}: labels are the names of two or more class folders, and {found}")
    return pictures


def _labelled_shards(folder: Path) -> ShardPictures:
    pictures = shard_pictures(folder)
    if len(pictures.classes) < 2:
        raise UserError(
            f"{printable(folder)}: labels are the numbers of two or more classes in the shards' .cls members, and "
            f"{'all pictures are of one' if pictures.classes else 'not every picture has one'}"
        )
    return pictures


def _different(train: FilePictures | ShardPictures, test: FilePictures | ShardPictures) -> str:
    parts = [
        f"only in {printable(one.root)}: {', '.join(sorted(set(one.classes) - set(other.classes)))}"
        for one, other in ((train, test), (test, train))
        if set(one.classes) - set(other.classes)
    ]
    return f"the classes to learn from and to test on differ; {'; '.join(parts)}"
