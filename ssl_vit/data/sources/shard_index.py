"""Positions of the images in tar shards (WebDataset layout): read from the tar headers, or from an index file."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.file_kinds import EXTENSIONS
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError

log = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

INDEX_FILE = "shards.safetensors"
MANIFEST_FILE = "ssl-vit-shards.json"

_CHECKSUM = "sha256"  # key of the checksum of the arrays in the index
FURTHER_IMAGES = "further images of a sample"  # a kind of ignored members
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gzip, bz2, xz, zstd, lz4
_EXPECTED = EXTENSIONS | {".cls", ".json"}
_LABEL = re.compile(rb"\s*\d{1,18}\s*")  # fits into int64
_MAX_LABEL_BYTES = 32  # of a .cls member, white space included
# Raised by tarfile on damaged headers; OSError: the disk's own errors.
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError)


class TarIndex(NamedTuple):
    """The n images of one tar file, in its order."""

    names: PackedPaths  # (n,) of the members
    offset: Integers  # (n,) bytes from the start of the file
    size: Integers  # (n,) bytes
    label: Integers  # (n,) -1 where unknown
    bytes: int  # of the whole file
    ignored: Counter[str]  # number of other members by kind
    damage: str  # empty if there is none


class ShardIndex(NamedTuple):
    """The N images of T tar files."""

    tars: PackedPaths  # (T,) paths relative to their folder
    bytes: Integers  # (T,) of each tar file
    names: PackedPaths  # (N,) of the members
    tar: npt.NDArray[np.int32]  # (N,) index of the tar file
    offset: Integers  # (N,) bytes from its start
    size: Integers  # (N,) bytes
    label: Integers  # (N,) -1 where unknown


class ShardManifest(BaseModel):
    """The input of `write_shards`; the same input gives the same shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # unreadable ones included; `pictures` in version 0.1
    num_images: int = Field(validation_alias=AliasChoices("num_images", "pictures"))
    shard_bytes: int  # maximum size of a tar file, unless it has a single image
    fingerprint: str  # of the images' names and sizes
    classes: list[str]  # names of the labels in .cls members


class _Member(NamedTuple):
    name: str
    key: str  # shared by the members of a sample: the path up to the first dot of the file name
    kind: str  # the extension after the last dot
    dots: int  # in the extension from the first dot on
    offset: int
    size: int
    label: int  # of a .cls member, else -1


def index_tar(path: Path) -> TarIndex:
    """List the images of a tar file, one per sample; only headers and `.cls` members are read.

    Of several images of a sample (`7.jpg`, `7.seg.png`), the one with the fewest dots is used, then the first; but see
    `_split_dotted`. Links, devices and sparse files are ignored. Nothing is unpacked, so names such as `../../x.jpg`
    are harmless. Of a damaged file, the samples before the damaged one are used.

    Raises:
        UserError: The file is compressed.
    """
    ignored: Counter[str] = Counter()
    damage: list[str] = []
    images: list[_Member] = []
    labels: list[int] = []
    complete = 0  # images of samples that are followed by another
    samples = groupby(_read_members(path, ignored, damage), key=attrgetter("key"))
    for members in chain.from_iterable(_split_dotted(list(sample)) for _, sample in samples):
        complete = len(images)
        candidates = [member for member in members if member.kind in EXTENSIONS]
        if candidates:
            images.append(min(candidates, key=attrgetter("dots")))
            labels.append(_label_of(images[-1], members))
            ignored[FURTHER_IMAGES] += len(candidates) - 1
        ignored.update(member.kind for member in members if member.kind not in _EXPECTED)
    if damage:
        del images[complete:], labels[complete:]
    return TarIndex(
        PackedPaths.from_iterable(image.name.encode("utf-8", "surrogateescape") for image in images),
        np.array([image.offset for image in images], dtype=np.int64),
        np.array([image.size for image in images], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        path.stat().st_size if path.exists() else 0,
        +ignored,
        "; ".join(damage),
    )


def _split_dotted(sample: list[_Member]) -> list[list[_Member]]:
    """Split a sample that is none: its names hold dots of their own (`2024.05.01.jpg`, `clip.0001.jpg`).

    That is so if it has several images of one kind, and no member is named by the key and an extension alone, as
    `7.jpg` or `7.cls` beside `7.left.jpg` and `7.right.jpg`; or if each of several images has a label of its own. Its
    members are then samples by the path up to the last dot. Members that follow each other are of one sample, as
    everywhere in WebDataset.
    """
    images = [member for member in sample if member.kind in EXTENSIONS]
    labeled = {_stem(member) for member in sample if member.kind == ".cls"}
    own_labels = len(images) > 1 and all(_stem(image) in labeled for image in images) and len(labeled) > 1
    repeated = len(images) > len({image.kind for image in images})
    if not own_labels and not (repeated and all(member.dots for member in sample)):
        return [sample]
    return [list(members) for _, members in groupby(sample, key=lambda member: member.name.rpartition(".")[0])]


def _label_of(image: _Member, members: list[_Member]) -> int:
    """Return the label of a sample: the .cls member with the image's own name, else the only value; -1 if unclear."""
    own = [member.label for member in members if member.kind == ".cls" and _stem(member) == _stem(image)]
    values = {member.label for member in members if member.kind == ".cls"}
    return own[0] if own else values.pop() if len(values) == 1 else -1


def _stem(member: _Member) -> str:
    """Return the path up to the last dot."""
    return member.name.rpartition(".")[0]


def compressed_message(path: Path) -> str:
    """Explain why a compressed tar file cannot be used."""
    return (
        f"{escape_path(path.absolute())} is compressed, which prevents random access to its images. Unpack it to a "
        "plain .tar; the images are compressed themselves"
    )


def concat_indices(tars: PackedPaths, indices: list[TarIndex]) -> ShardIndex:
    """Concatenate the indices of tar files with these paths."""
    columns = zip(*((index.offset, index.size, index.label) for index in indices), strict=True)
    return ShardIndex(
        tars,
        np.array([index.bytes for index in indices], dtype=np.int64),
        PackedPaths.from_iterable(chain.from_iterable(index.names for index in indices)),
        np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.names) for index in indices]),
        *map(np.concatenate, columns),
    )


def write_shard_index(folder: Path, index: ShardIndex) -> None:
    """Write the index into the folder of the tar files, atomically."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, value in index._asdict().items():
        packed = isinstance(value, PackedPaths)
        arrays |= {f"{name}.text": value.text, f"{name}.ends": value.ends} if packed else {name: value}
    with atomic_write(folder / INDEX_FILE) as file:
        file.write(save(arrays, {_CHECKSUM: _checksum(arrays)}))


def read_shard_index(folder: Path, tars: PackedPaths, sizes: Integers) -> ShardIndex | None:
    """Load the index of a folder with these tar files (T,) of these sizes (T,) in bytes; None if it has none.

    A damaged index, and one that is older than a tar file, is ignored with a warning.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        arrays = load_file(path)
        with safe_open(path, "np") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
        if checksum not in (None, _checksum(arrays)):  # version 0.1 wrote none
            raise ValueError("another checksum")
        label = "label" if "label" in arrays else "number"  # of version 0.1
        index = ShardIndex(
            PackedPaths(arrays["tars.text"], arrays["tars.ends"]),
            arrays["bytes"],
            PackedPaths(arrays["names.text"], arrays["names.ends"]),
            *(arrays[name] for name in ("tar", "offset", "size", label)),
        )
        _check_index(index)
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning(f"{escape_path(path)} is damaged ({escape_path(str(error))}); the tar files are indexed again")
        return None
    if index.tars.fingerprint() != tars.fingerprint() or not np.array_equal(index.bytes, sizes):
        log.warning(f"{escape_path(path)} does not belong to the tar files of this folder; they are indexed again")
        return None
    if path.stat().st_mtime_ns < max((folder / os.fsdecode(tar)).stat().st_mtime_ns for tar in tars):
        log.warning(f"{escape_path(path)} is older than a tar file, which may have changed; they are indexed again")
        return None
    return index


def _checksum(arrays: dict[str, npt.NDArray[np.generic]]) -> str:
    content = (name.encode() + values.tobytes() for name, values in sorted(arrays.items()))
    return hashlib.sha256(b"".join(content)).hexdigest()


def read_manifest(folder: Path) -> ShardManifest | None:
    """Load the manifest of a folder of shards; None if there is none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        return ShardManifest.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{escape_path(path.absolute())} is not what ssl-vit shard writes; delete it") from None


def _check_index(index: ShardIndex) -> None:
    """Raise a ValueError if the index refers to anything outside of its own arrays or files."""
    count = len(index.names)
    for paths in (index.tars, index.names):
        if paths.text.dtype != np.uint8 or paths.ends.ndim != 1 or not len(paths.ends):
            raise ValueError("names of another type or shape")
        if paths.ends[0] != 0 or paths.ends[-1] != len(paths.text) or (np.diff(paths.ends) < 0).any():
            raise ValueError("overlapping names")
    columns = (index.tar, index.offset, index.size, index.label)
    if any(column.dtype.kind != "i" for column in (*columns, index.bytes, index.tars.ends, index.names.ends)):
        raise ValueError("columns that are not integers")
    if any(column.shape != (count,) for column in columns) or index.bytes.shape != (len(index.tars),):
        raise ValueError("columns of different lengths")
    if not count or index.tar.min() < 0 or index.tar.max() >= len(index.tars):
        raise ValueError("images in no tar file")
    ends = index.offset + index.size
    if index.offset.min() < 0 or index.size.min() < 0 or (ends > index.bytes[index.tar]).any():
        raise ValueError("images outside of their tar files")


def _read_members(path: Path, ignored: Counter[str], damage: list[str]) -> Iterator[_Member]:
    """Yield the regular files of a tar file, up to and including a damaged one, whose damage is added to `damage`."""
    try:
        with path.open("rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                raise UserError(compressed_message(path))
            file.seek(0)
            end = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined] # else it keeps them all
                    if not info.isreg() or info.issparse():
                        ignored["links, devices and sparse files"] += not info.isdir()
                    elif (member := _parse_member(info, file)).key.endswith("/"):
                        ignored["hidden"] += 1
                    else:
                        yield member
                    if info.size < 0 or info.offset_data + info.size * info.isreg() > end:
                        damage.append(f"truncated in {escape_path(info.name.encode('utf-8', 'surrogateescape'))}")
                        return
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    damage.append(f"truncated or damaged at byte {tar.offset:,}")
    except UserError:  # a ValueError too
        raise
    except _TAR_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        damage.append(escape_path(" ".join(reason.split())) or type(error).__name__)


def _parse_member(info: tarfile.TarInfo, file: BinaryIO) -> _Member:
    """Parse the member whose content starts at the position of `file`."""
    folder, _, name = info.name.rpartition("/")
    stem, _, extension = name.partition(".")
    kind = f".{extension.rpartition('.')[2].lower()}" if extension else "without extension"
    label = -1
    if kind == ".cls" and 0 <= info.size <= _MAX_LABEL_BYTES and _LABEL.fullmatch(text := file.read(info.size)):
        label = int(text)
    return _Member(info.name, f"{folder}/{stem}", kind, extension.count("."), info.offset_data, info.size, label)
