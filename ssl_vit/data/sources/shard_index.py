"""Index of a folder of shards: where each image lies, and the names of the classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.tar_index import Integers, TarIndex
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError

log = logging.getLogger(__name__)

LISTING = "shards.safetensors"
MANIFEST = "ssl-vit-shards.json"


class ShardIndex(NamedTuple):
    """Where N images lie in T tar files."""

    tars: PackedPaths  # (T,) paths relative to their folder
    bytes: Integers  # (T,) of each tar file
    names: PackedPaths  # (N,) of the members
    tar: npt.NDArray[np.int32]  # (N,) which tar file
    offset: Integers  # (N,) bytes from its start
    size: Integers  # (N,) bytes
    number: Integers  # (N,) of the class, -1 where unknown


class ShardManifest(BaseModel):
    """What a folder of shards was made of; the same makes the same shards again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: int  # found, the unreadable ones included
    shard_bytes: int  # most bytes of a tar file, unless it holds a single image
    fingerprint: str  # of the images' names and sizes
    classes: list[str]  # the names of the numbers in .cls members


def concat_indices(tars: PackedPaths, listed: list[TarIndex]) -> ShardIndex:
    """Concatenate the indices of several tar files, given their names and members."""
    names = [tar.names for tar in listed]
    starts = np.cumsum([0, *(len(one.text) for one in names)])
    ends = [one.ends[1:] + start for one, start in zip(names, starts[:-1], strict=True)]
    return ShardIndex(
        tars,
        np.array([tar.bytes for tar in listed], dtype=np.int64),
        PackedPaths(np.concatenate([one.text for one in names]), np.concatenate([np.zeros(1, np.int64), *ends])),
        np.repeat(np.arange(len(listed), dtype=np.int32), [len(one) for one in names]),
        np.concatenate([tar.offset for tar in listed]),
        np.concatenate([tar.size for tar in listed]),
        np.concatenate([tar.number for tar in listed]),
    )


def write_listing(folder: Path, listing: ShardIndex) -> None:
    """Write the listing into the tar files' folder, whole or not at all."""
    with atomic_write(folder / LISTING) as file:
        file.write(save(_as_arrays(listing)))


def read_listing(folder: Path, tars: PackedPaths, sizes: Integers) -> ShardIndex | None:
    """Load the index of a folder with these tar files (T,), of these sizes (T,) in bytes; None if it has none.

    A damaged listing, or one of other files, is not used, which is said.
    """
    path = folder / LISTING
    if not path.is_file():
        return None
    try:
        arrays = load_file(path)
        listing = ShardIndex(
            PackedPaths(arrays["tars.text"], arrays["tars.ends"]),
            arrays["bytes"],
            PackedPaths(arrays["names.text"], arrays["names.ends"]),
            *(arrays[name] for name in ("tar", "offset", "size", "number")),
        )
        _check(listing)
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning(f"{escape_path(path)} is damaged ({escape_path(str(error))}); the tar files are indexed again")
        return None
    if listing.tars.fingerprint() != tars.fingerprint() or not np.array_equal(listing.bytes, sizes):
        log.warning(f"{escape_path(path)} does not belong to the tar files of this folder; they are indexed again")
        return None
    return listing


def read_manifest(folder: Path) -> ShardManifest | None:
    """Load the manifest of a folder of shards; None if there is none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return ShardManifest.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{escape_path(path.absolute())} is not what ssl-vit shard writes; delete it") from None


def _as_arrays(listing: ShardIndex) -> dict[str, npt.NDArray[np.generic]]:
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, value in listing._asdict().items():
        arrays |= (
            {f"{name}.text": value.text, f"{name}.ends": value.ends}
            if isinstance(value, PackedPaths)
            else {name: value}
        )
    return arrays


def _check(listing: ShardIndex) -> None:
    """Raise a ValueError where the listing would lead out of its own arrays or files."""
    count = len(listing.names)
    for names in (listing.tars, listing.names):
        if names.text.dtype != np.uint8 or names.ends.ndim != 1 or not len(names.ends):
            raise ValueError("names of another form")
        if names.ends[0] != 0 or names.ends[-1] != len(names.text) or (np.diff(names.ends) < 0).any():
            raise ValueError("names that overlap")
    columns = (listing.tar, listing.offset, listing.size, listing.number)
    if any(column.dtype.kind != "i" for column in (*columns, listing.bytes, listing.tars.ends, listing.names.ends)):
        raise ValueError("columns that are not of whole numbers")
    if any(column.shape != (count,) for column in columns) or listing.bytes.shape != (len(listing.tars),):
        raise ValueError("columns of different lengths")
    if not count or listing.tar.min() < 0 or listing.tar.max() >= len(listing.tars):
        raise ValueError("images in no tar file")
    ends = listing.offset + listing.size
    if listing.offset.min() < 0 or listing.size.min() < 0 or (ends > listing.bytes[listing.tar]).any():
        raise ValueError("images outside of their tar files")
