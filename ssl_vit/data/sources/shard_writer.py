"""Write images into tar shards (WebDataset layout): bytes as they are; the same input gives the same shards."""

from __future__ import annotations

import hashlib
import json
import stat
import tarfile
from io import BytesIO
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
    LISTING,
    MANIFEST,
    ShardIndex,
    ShardManifest,
    concat_indices,
    read_manifest,
    write_listing,
)
from ssl_vit.data.sources.tar_index import Integers, TarIndex, index_tar
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.workers import map_threads

_END = bytes(2 * tarfile.BLOCKSIZE)
_LARGEST = 2**31 - 1  # bytes of an image: what one read gives
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # by Pillow's format; other formats' are their names


class Shards(NamedTuple):
    """What `write_shards` wrote."""

    tars: int
    num_images: int
    bytes: int
    skipped: SkippedImageLog


class _Member(NamedTuple):
    extension: str
    content: bytes


def write_shards(dataset: ImageFolder, out: Path, *, shard_bytes: int) -> Shards:
    """Write all images into `shard-NNNNNN.tar` files of the folder `out`, and the listing of these.

    The sample of image i has the key i in nine digits, and the members `.jpg` (or what the format is), `.cls` (the
    class's number, where there are class folders) and `.json` (`path`: the image's path as printable text). Of each
    image only the header is read: images without a readable one are skipped and listed in `skipped_images.txt`; other
    damage is found in training. A shard is written whole or not at all. Called again after an interruption,
    it resumes: existing undamaged shards are kept.

    Args:
        dataset: To be copied.
        out: A new folder, or one that a call with the same images and size was writing to.
        shard_bytes: Most bytes of a shard; only a single image may exceed it.

    Raises:
        UserError: `out` holds other shards, cannot be written to or is full, or no image can be read.
    """
    sizes = np.array([_file_size(dataset.path(index)) for index in range(len(dataset))], dtype=np.int64)
    fingerprint = hashlib.sha256(f"{dataset.names.fingerprint()} {dataset.labels.tolist()}".encode())
    fingerprint.update(sizes.tobytes())
    manifest = ShardManifest(
        dataset=len(dataset),
        shard_bytes=shard_bytes,
        fingerprint=fingerprint.hexdigest(),
        classes=dataset.classes,
    )
    skipped = SkippedImageLog(out / "skipped_images.txt")
    try:
        _begin(out, manifest)
        with FileLock(out / ".lock", timeout=0):
            listing = _write_all(dataset, out, _ends(dataset, sizes, shard_bytes), skipped)
    except Timeout:
        raise UserError(f"{escape_path(out.absolute())}: another ssl-vit shard is writing into this folder") from None
    except OSError as error:
        raise UserError(
            f"{escape_path(out.absolute())}: {error.strerror}. The shards that are there are whole: when this is "
            "remedied, the same command resumes after them"
        ) from error
    return Shards(len(listing.tars), len(listing.names), int(listing.bytes.sum()), skipped)


def _write_all(dataset: ImageFolder, out: Path, ends: list[int], skipped: SkippedImageLog) -> ShardIndex:
    """Write the shards that are missing, and the listing of all."""
    names, listed = [], list[TarIndex]()
    for number, (first, last) in enumerate(pairwise([0, *ends])):
        path = out / f"shard-{number:06d}.tar"
        tar = index_tar(path) if path.exists() else None
        if tar is None or tar.damage:
            _write(path, dataset, range(first, last), skipped, label=f"shard {number + 1} of {len(ends)}")
            tar = index_tar(path)
        names.append(path.name.encode())
        listed.append(tar)
    listing = concat_indices(PackedPaths.from_iterable(names), listed)
    if not len(listing.names):
        raise UserError(
            f"none of the {len(dataset):,} images can be read; {escape_path(skipped.path)} lists the reasons"
        )
    write_listing(out, listing)
    return listing


def _begin(out: Path, manifest: ShardManifest) -> None:
    """Make the folder, or see that it was made for the same shards."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={escape_path(out.absolute())} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    before = read_manifest(out)
    if before is None and (any(out.glob("*.tar")) or (out / LISTING).exists()):
        raise UserError(f"{escape_path(out.absolute())} holds shards that ssl-vit did not write; name another folder")
    if before not in (None, manifest):
        raise UserError(
            f"{escape_path(out.absolute())} holds shards of other images, or of another size (shard_mb), or the "
            "images have changed since they were begun; name another folder, or delete this one"
        )
    with atomic_write(out / MANIFEST) as file:
        file.write(manifest.model_dump_json(indent=1).encode())


def _ends(dataset: ImageFolder, sizes: Integers, shard_bytes: int) -> list[int]:
    """Behind which image each shard ends; found from the files' sizes alone, so that it can be found again."""
    ends, used = [], len(_END)
    for index in range(len(dataset)):
        contents = [int(sizes[index]), *(len(member.content) for member in _facts(dataset, index))]
        sample = sum(tarfile.BLOCKSIZE + size + _padding(size) for size in contents)
        if used + sample > shard_bytes and used > len(_END):
            ends.append(index)
            used = len(_END)
        used += sample
    return [*ends, len(dataset)]


def _write(path: Path, dataset: ImageFolder, places: range, skipped: SkippedImageLog, *, label: str) -> None:
    """Write one shard with the images at these places."""
    samples = map_threads(lambda i: _sample(dataset, places[i]), len(places), label=label, show=True)
    with atomic_write(path) as file:
        for place, sample in zip(places, samples, strict=True):
            if isinstance(sample, UnreadableImageError):
                skipped.record(sample)
                continue
            for extension, content in sample:
                header = tarfile.TarInfo(f"{place:09d}.{extension}")  # of no owner and no time
                header.size = len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                file.write(content)
                file.write(bytes(_padding(len(content))))
        file.write(_END)


def _sample(dataset: ImageFolder, index: int) -> list[_Member] | UnreadableImageError:
    try:
        status = dataset.path(index).stat()
        if not stat.S_ISREG(status.st_mode):  # reading from a pipe would wait for its other end
            return UnreadableImageError(dataset.name(index), "no file but a folder, pipe, socket or device")
        if status.st_size > _LARGEST:
            return UnreadableImageError(dataset.name(index), "more than 2 GiB")
        content = dataset.path(index).read_bytes()
        with open_image(BytesIO(content)) as image:
            kind = str(image.format)
    except OSError as error:
        return UnreadableImageError(dataset.name(index), error.strerror or str(error))
    except ValueError as error:
        return UnreadableImageError(dataset.name(index), str(error))
    except UnreadableImageError as broken:
        return UnreadableImageError(dataset.name(index), broken.reason)
    return [_Member(_EXTENSIONS.get(kind, kind.lower()), content), *_facts(dataset, index)]


def _facts(dataset: ImageFolder, index: int) -> list[_Member]:
    """Return the metadata members of a sample."""
    path = json.dumps({"path": dataset.name(index)}, ensure_ascii=False).encode()
    label = [_Member("cls", b"%d" % dataset.labels[index])] if dataset.classes else []
    return [*label, _Member("json", path)]


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _file_size(path: Path) -> int:
    """In bytes, 0 for a file that is not there."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a list may hold names that no file can have
        return 0
