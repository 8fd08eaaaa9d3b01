"""From picture files to tar shards (WebDataset layout): bytes as they are; the same input gives the same shards."""

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

from ssl_vit.data.decode import opened
from ssl_vit.data.files import FilePictures
from ssl_vit.data.names import Names
from ssl_vit.data.parallel import in_threads
from ssl_vit.data.pictures import BrokenPicture, SkippedPictures, printable
from ssl_vit.data.shard_listing import LISTING, MANIFEST, Listing, Manifest, joined, read_manifest, write_listing
from ssl_vit.data.tars import Integers, Tar, list_tar
from ssl_vit.durable import durable
from ssl_vit.errors import UserError

_END = bytes(2 * tarfile.BLOCKSIZE)
_LARGEST = 2**31 - 1  # bytes of a picture: what one read gives
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # by Pillow's format; other formats' are their names


class Shards(NamedTuple):
    """What `write_shards` left in its folder."""

    tars: int
    pictures: int
    bytes: int
    skipped: SkippedPictures


class _Member(NamedTuple):
    extension: str
    content: bytes


def write_shards(pictures: FilePictures, out: Path, *, shard_bytes: int) -> Shards:
    """Write all pictures into `shard-NNNNNN.tar` files of the folder `out`, and the listing of these.

    The sample of picture i has the key i in nine digits, and the members `.jpg` (or what the format is), `.cls` (the
    class's number, where there are class folders) and `.json` (`path`: the picture's path as printable text). Of each
    picture the header is read: what has none that can be read is left out and named in `skipped.txt`; damage further
    in is found when training reads it. A shard is written whole or not at all. Called again after an interruption,
    it goes on: shards that are there and undamaged are kept.

    Args:
        pictures: To be copied.
        out: A new folder, or one that a call with the same pictures and size was writing to.
        shard_bytes: Most bytes of a shard; only a single picture may exceed it.

    Raises:
        UserError: `out` holds other shards, cannot be written to or is full, or no picture can be read.
    """
    sizes = np.array([_file_size(pictures.path(index)) for index in range(len(pictures))], dtype=np.int64)
    fingerprint = hashlib.sha256(f"{pictures.names.fingerprint()} {pictures.labels.tolist()}".encode())
    fingerprint.update(sizes.tobytes())
    manifest = Manifest(
        pictures=len(pictures),
        shard_bytes=shard_bytes,
        fingerprint=fingerprint.hexdigest(),
        classes=pictures.classes,
    )
    skipped = SkippedPictures(out / "skipped.txt")
    try:
        _begin(out, manifest)
        with FileLock(out / ".lock", timeout=0):
            listing = _write_all(pictures, out, _ends(pictures, sizes, shard_bytes), skipped)
    except Timeout:
        raise UserError(f"{printable(out.absolute())}: another ssl-vit shard is writing into this folder") from None
    except OSError as error:
        raise UserError(
            f"{printable(out.absolute())}: {error.strerror}. The shards that are there are whole: when this is "
            "remedied, the same command goes on behind them"
        ) from error
    return Shards(len(listing.tars), len(listing.names), int(listing.bytes.sum()), skipped)


def _write_all(pictures: FilePictures, out: Path, ends: list[int], skipped: SkippedPictures) -> Listing:
    """Write the shards that are missing, and the listing of all."""
    names, listed = [], list[Tar]()
    for number, (first, last) in enumerate(pairwise([0, *ends])):
        path = out / f"shard-{number:06d}.tar"
        tar = list_tar(path) if path.exists() else None
        if tar is None or tar.damage:
            _write(path, pictures, range(first, last), skipped, label=f"shard {number + 1} of {len(ends)}")
            tar = list_tar(path)
        names.append(path.name.encode())
        listed.append(tar)
    listing = joined(Names.pack(names), listed)
    if not len(listing.names):
        raise UserError(f"none of the {len(pictures):,} pictures can be read; {printable(skipped.path)} says why")
    write_listing(out, listing)
    return listing


def _begin(out: Path, manifest: Manifest) -> None:
    """Make the folder, or see that it was made for the same shards."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={printable(out.absolute())} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    before = read_manifest(out)
    if before is None and (any(out.glob("*.tar")) or (out / LISTING).exists()):
        raise UserError(f"{printable(out.absolute())} holds shards that ssl-vit did not write; name another folder")
    if before not in (None, manifest):
        raise UserError(
            f"{printable(out.absolute())} holds shards of other pictures, or of another size (shard_mb), or the "
            "pictures have changed since they were begun; name another folder, or delete this one"
        )
    with durable(out / MANIFEST) as file:
        file.write(manifest.model_dump_json(indent=1).encode())


def _ends(pictures: FilePictures, sizes: Integers, shard_bytes: int) -> list[int]:
    """Behind which picture each shard ends; found from the files' sizes alone, so that it can be found again."""
    ends, used = [], len(_END)
    for index in range(len(pictures)):
        contents = [int(sizes[index]), *(len(member.content) for member in _facts(pictures, index))]
        sample = sum(tarfile.BLOCKSIZE + size + _padding(size) for size in contents)
        if used + sample > shard_bytes and used > len(_END):
            ends.append(index)
            used = len(_END)
        used += sample
    return [*ends, len(pictures)]


def _write(path: Path, pictures: FilePictures, places: range, skipped: SkippedPictures, *, label: str) -> None:
    """Write one shard with the pictures at these places."""
    samples = in_threads(lambda i: _sample(pictures, places[i]), len(places), label=label, show=True)
    with durable(path) as file:
        for place, sample in zip(places, samples, strict=True):
            if isinstance(sample, BrokenPicture):
                skipped.record(sample)
                continue
            for extension, content in sample:
                header = tarfile.TarInfo(f"{place:09d}.{extension}")  # of no owner and no time
                header.size = len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                file.write(content)
                file.write(bytes(_padding(len(content))))
        file.write(_END)


def _sample(pictures: FilePictures, index: int) -> list[_Member] | BrokenPicture:
    try:
        status = pictures.path(index).stat()
        if not stat.S_ISREG(status.st_mode):  # reading from a pipe would wait for its other end
            return BrokenPicture(pictures.name(index), "no file but a folder, pipe, socket or device")
        if status.st_size > _LARGEST:
            return BrokenPicture(pictures.name(index), "more than 2 GiB")
        content = pictures.path(index).read_bytes()
        with opened(BytesIO(content)) as picture:
            kind = str(picture.format)
    except OSError as error:
        return BrokenPicture(pictures.name(index), error.strerror or str(error))
    except ValueError as error:
        return BrokenPicture(pictures.name(index), str(error))
    except BrokenPicture as broken:
        return BrokenPicture(pictures.name(index), broken.reason)
    return [_Member(_EXTENSIONS.get(kind, kind.lower()), content), *_facts(pictures, index)]


def _facts(pictures: FilePictures, index: int) -> list[_Member]:
    """What a sample holds beside the picture."""
    path = json.dumps({"path": pictures.name(index)}, ensure_ascii=False).encode()
    label = [_Member("cls", b"%d" % pictures.labels[index])] if pictures.classes else []
    return [*label, _Member("json", path)]


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _file_size(path: Path) -> int:
    """In bytes, 0 for a file that is not there."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a list may hold names that no file can have
        return 0
