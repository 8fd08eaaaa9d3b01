"""Index of a tar file in the WebDataset layout: its images, their byte offsets and classes."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.decode import EXTENSIONS
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.errors import UserError

Integers = npt.NDArray[np.int64]

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gzip, bz2, xz, zstd, lz4
_EXPECTED = EXTENSIONS | {".cls", ".json"}
_NUMBER = re.compile(rb"\s*\d{1,18}\s*")  # fits into int64
_LONGEST_NUMBER = 32  # bytes of a .cls member, white space included
# What tarfile has been seen to raise on damaged headers; OSError: the disk's own errors.
_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError)


class TarIndex(NamedTuple):
    """The n images of one tar file, in its order."""

    names: PackedPaths  # of the members (n,)
    offset: Integers  # (n,) bytes from the start of the file
    size: Integers  # (n,) bytes
    number: Integers  # (n,) of the class, -1 where unknown
    bytes: int  # of the whole file
    ignored: Counter[str]  # what else there is, by kind
    damage: str  # empty where there is none


class _Member(NamedTuple):
    name: str
    key: str  # what the members of one sample share: the path up to the first dot of the file name
    kind: str  # the extension, behind the last dot
    dots: int  # in the extension from the first dot on
    offset: int
    size: int
    number: int  # what a .cls member says, else -1


def index_tar(path: Path) -> TarIndex:
    """List the images of a tar file, one for each sample; only headers and `.cls` members are read.

    Of several images of one sample (`7.jpg`, `7.seg.png`) the one with the fewest dots counts, then the first. Only
    plain files count: links, devices and sparse files are ignored. Nothing is ever unpacked, so names such as
    `../../x.jpg` do no harm. In a damaged file, all samples before the one with the damage are used.

    Raises:
        UserError: The file is compressed.
    """
    ignored: Counter[str] = Counter()
    damage: list[str] = []
    dataset: list[_Member] = []
    numbers: list[int] = []
    complete = 0  # images of samples that others follow
    for _, sample in groupby(_members(path, ignored, damage), key=attrgetter("key")):
        complete = len(dataset)
        members = list(sample)
        found = [member for member in members if member.kind in EXTENSIONS]
        if found:
            dataset.append(min(found, key=attrgetter("dots")))
            numbers.append(max(member.number for member in members))
            ignored["further images of a sample"] += len(found) - 1
        ignored.update(member.kind for member in members if member.kind not in _EXPECTED)
    if damage:
        del dataset[complete:], numbers[complete:]
    return TarIndex(
        PackedPaths.from_iterable(image.name.encode("utf-8", "surrogateescape") for image in dataset),
        np.array([image.offset for image in dataset], dtype=np.int64),
        np.array([image.size for image in dataset], dtype=np.int64),
        np.array(numbers, dtype=np.int64),
        path.stat().st_size if path.exists() else 0,
        +ignored,
        "; ".join(damage),
    )


def _members(path: Path, ignored: Counter[str], damage: list[str]) -> Iterator[_Member]:
    """Yield the regular files of a tar file, up to and including one that is damaged."""
    try:
        with path.open("rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                raise UserError(refusal(path))
            file.seek(0)
            end = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined] # else it keeps them all
                    if not member.isreg() or member.issparse():
                        ignored["links, devices and sparse files"] += not member.isdir()
                    elif (described := _described(member, file)).key.endswith("/"):
                        ignored["hidden"] += 1
                    else:
                        yield described
                    if member.size < 0 or member.offset_data + member.size * member.isreg() > end:
                        damage.append(f"cut off in {escape_path(member.name.encode('utf-8', 'surrogateescape'))}")
                        return
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    damage.append(f"cut off or damaged at byte {tar.offset:,}")
    except UserError:  # a ValueError too
        raise
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        damage.append(escape_path(" ".join(reason.split())) or type(error).__name__)


def _described(member: tarfile.TarInfo, file: BinaryIO) -> _Member:
    """Return the member whose header ends at the position of `file`."""
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    kind = f".{extension.rpartition('.')[2].lower()}" if extension else "without extension"
    number = -1
    if kind == ".cls" and 0 <= member.size <= _LONGEST_NUMBER and _NUMBER.fullmatch(text := file.read(member.size)):
        number = int(text)
    return _Member(member.name, f"{folder}/{stem}", kind, extension.count("."), member.offset_data, member.size, number)


def refusal(path: Path) -> str:
    """Why a compressed tar file is of no use."""
    return (
        f"{escape_path(path.absolute())} is compressed: images are read from any place of a tar file, which "
        "compression does not allow. Unpack it to a plain .tar; images are compressed themselves"
    )
