"""Write image files into tar shards (WebDataset layout): bytes as they are; the same input gives the same shards.

webdataset 1.0.2 is not used for writing. Measured with 600 PNG images and a bound of 200 kB: ShardWriter exceeds the
bound in 74 of 75 shards, and if it is interrupted, it leaves a valid tar file with too few images under the final name.
TarWriter pads the file to a multiple of 10,240 bytes, and so exceeds the bound in 21 of 99 shards.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError, escape_path
from ssl_vit.data.sources.decode import open_image
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.shard_index import (
    INDEX_FILE,
    MANIFEST_FILE,
    Integers,
    ShardIndex,
    ShardManifest,
    TarIndex,
    concat_indices,
    index_tar,
    read_manifest,
    write_shard_index,
)
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.workers import map_threads

_TAR_END = bytes(2 * tarfile.BLOCKSIZE)
_MAX_IMAGE_BYTES = 2**31 - 1  # limit of one read
# By Pillow's format; others are the format in lower case.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}

Members = list[tuple[str, bytes]]  # extension and content of each member of a sample


class Shards(NamedTuple):
    """The result of `write_shards`."""

    tars: int
    num_images: int
    bytes: int
    skipped: SkippedImageLog


def write_shards(dataset: ImageFolder, out: Path, *, shard_bytes: int) -> Shards:
    """Write all images into `shard-NNNNNN.tar` files in the folder `out`, and their index.

    The sample of image i has the key i in nine digits and the members `.jpg` (or another format), `.cls` (the label,
    if there are class folders) and `.json` (`path`: the image's path as printable text). Only the header of each image
    is checked: images without a readable one are skipped and listed in `skipped_images.txt`; other damage is found in
    training. Each shard is written atomically. After an interruption, the same call resumes: complete shards are kept.

    `out` is a new folder, or one that a call with the same images and size was writing to. Only a single image may
    exceed the maximum size of a shard, `shard_bytes`.

    Raises:
        UserError: `out` has other shards, cannot be written to or is full, or no image can be read.
    """
    sizes = np.array([_file_size(dataset.path(index)) for index in range(len(dataset))], dtype=np.int64)
    fingerprint = hashlib.sha256(f"{dataset.names.fingerprint()} {dataset.labels.tolist()}".encode())
    fingerprint.update(sizes.tobytes())
    manifest = ShardManifest(
        num_images=len(dataset),
        shard_bytes=shard_bytes,
        fingerprint=fingerprint.hexdigest(),
        classes=dataset.classes,
    )
    skipped = SkippedImageLog(out / "skipped_images.txt")
    try:
        _prepare_folder(out, manifest)
        with FileLock(out / ".lock", timeout=0):
            index = _write_missing_shards(dataset, out, _shard_ends(dataset, sizes, shard_bytes), skipped)
    except Timeout:
        raise UserError(f"{escape_path(out.absolute())}: another ssl-vit shard is writing into this folder") from None
    except OSError as error:
        raise UserError(
            f"{escape_path(out.absolute())}: {error.strerror}. All shards in it are complete: once the problem is "
            "solved, the same command resumes after them"
        ) from error
    return Shards(len(index.tars), len(index.names), int(index.bytes.sum()), skipped)


def _prepare_folder(out: Path, manifest: ShardManifest) -> None:
    """Create the folder, or check that it is of the same shards."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={escape_path(out.absolute())} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    existing = read_manifest(out)
    if existing is None and (any(out.glob("*.tar")) or (out / INDEX_FILE).exists()):
        raise UserError(f"{escape_path(out.absolute())} has shards that ssl-vit did not write; name another folder")
    if existing not in (None, manifest):
        raise UserError(
            f"{escape_path(out.absolute())} has shards of other images, or of another size (shard_mb), or the images "
            "have changed since the first shard; name another folder, or delete this one"
        )
    with atomic_write(out / MANIFEST_FILE) as file:
        file.write(manifest.model_dump_json(indent=1).encode())


def _write_missing_shards(dataset: ImageFolder, out: Path, ends: list[int], skipped: SkippedImageLog) -> ShardIndex:
    """Write the shards that are missing or damaged, and the index of all."""
    names, indices = [], list[TarIndex]()
    for number, (first, last) in enumerate(pairwise([0, *ends])):
        path = out / f"shard-{number:06d}.tar"
        tar = index_tar(path) if path.exists() else None
        if tar is None or tar.damage:
            _write_shard(path, dataset, range(first, last), skipped, label=f"shard {number + 1} of {len(ends)}")
            tar = index_tar(path)
        names.append(path.name.encode())
        indices.append(tar)
    index = concat_indices(PackedPaths.from_iterable(names), indices)
    if not len(index.names):
        reasons = f"{escape_path(skipped.path)} lists the reasons"
        raise UserError(f"none of the {len(dataset):,} images can be read; {reasons}")
    write_shard_index(out, index)
    return index


def _shard_ends(dataset: ImageFolder, sizes: Integers, shard_bytes: int) -> list[int]:
    """Return the index after the last image of each shard, from the file sizes only, so that a resumed call agrees."""
    ends, used = [], len(_TAR_END)
    for index in range(len(dataset)):
        members = [int(sizes[index]), *(len(content) for _, content in _metadata(dataset, index))]
        sample = sum(tarfile.BLOCKSIZE + size + _padding(size) for size in members)
        if used + sample > shard_bytes and used > len(_TAR_END):
            ends.append(index)
            used = len(_TAR_END)
        used += sample
    return [*ends, len(dataset)]


def _write_shard(path: Path, dataset: ImageFolder, indices: range, skipped: SkippedImageLog, *, label: str) -> None:
    """Write one shard with the images at these indices."""
    samples = map_threads(lambda i: _read_sample(dataset, indices[i]), len(indices), label=label, show=True)
    with atomic_write(path) as file:
        for index, sample in zip(indices, samples, strict=True):
            if isinstance(sample, UnreadableImageError):
                skipped.record(sample)
                continue
            for extension, content in sample:
                header = tarfile.TarInfo(f"{index:09d}.{extension}")  # without owner and time
                header.size = len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                file.write(content)
                file.write(bytes(_padding(len(content))))
        file.write(_TAR_END)


def _read_sample(dataset: ImageFolder, index: int) -> Members | UnreadableImageError:
    name, path = dataset.name(index), dataset.path(index)
    try:
        if path.stat().st_size > _MAX_IMAGE_BYTES:
            return UnreadableImageError(name, "more than 2 GiB")
        with open_image(path) as image:
            kind = str(image.format)
        content = path.read_bytes()
    except UnreadableImageError as error:
        return UnreadableImageError(name, error.reason)
    except (OSError, ValueError) as error:  # ValueError: a list may have names that no file can have
        return UnreadableImageError(name, getattr(error, "strerror", None) or str(error))
    return [(_EXTENSIONS.get(kind, kind.lower()), content), *_metadata(dataset, index)]


def _metadata(dataset: ImageFolder, index: int) -> Members:
    """Return the members of a sample besides the image."""
    path = json.dumps({"path": dataset.name(index)}, ensure_ascii=False).encode()
    label = [("cls", b"%d" % dataset.labels[index])] if dataset.classes else []
    return [*label, ("json", path)]


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _file_size(path: Path) -> int:
    """Return the size in bytes, 0 for a missing file."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a list may have names that no file can have
        return 0
