"""Feature cache: plain .npy files in a folder of their own, memory-mapped when read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.data.loading.loader import EvalDataset
from ssl_vit.data.sources.decode import DECODING
from ssl_vit.data.sources.image_index import cache_dir
from ssl_vit.evaluation.features.extractor import FeatureExtractor, Features, none_readable
from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.text import pluralize

SCHEMA = 1  # of the folder
PENDING, DONE, BROKEN = 0, 1, 2  # states of an image in state.npy
MANIFEST = "manifest.json"
_SPOT_CHECKS = 16  # images that are extracted again before the cache is used
_ROWS = 4096  # in memory at once
_MAX_NAME = 100  # characters of the data's name in the folder's

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureCache:
    """The features of the N images of a dataset, in a folder.

    The folder holds `cls.npy` (N, blocks, D) and `patch_mean.npy` (N, D) float16, `labels.npy` (N,) int64, `state.npy`
    (N,) uint8 (0 pending, 1 done, 2 unreadable), `checksums.npy` (N,) uint32 of the rows,
    `paths.txt` with a name per line, `skipped_images.txt`, and
    `manifest.json`, which is written last. Values beyond 65,504 become infinite, which `validate_features` rejects: no
    healthy model has such features after its final norm.
    """

    folder: Path
    identity: dict[str, Any]  # everything that determines the content
    extractor: FeatureExtractor
    dataset: ImageDataset
    blocks: int  # in the cache, at least those of the extractor

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the .npy files by name."""
        count, (width, patch_width) = len(self.dataset), self.extractor.shape
        return {
            "cls.npy": ((count, self.blocks, width), "<f2"),
            "patch_mean.npy": ((count, patch_width), "<f2"),
            "labels.npy": ((count,), "<i8"),
            "state.npy": ((count,), "|u1"),
            "checksums.npy": ((count,), "<u4"),
        }

    @property
    def skipped(self) -> SkippedImageLog:
        """The list of the unreadable images."""
        return SkippedImageLog(self.folder / "skipped_images.txt")

    def create(self) -> None:
        """Create the folder, replacing an existing one, with all images pending and all files at full size."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, (shape, dtype) in self.arrays.items():  # zeros, sparse until they are written
            np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=dtype, shape=shape)
        np.save(self.folder / "labels.npy", self.dataset.labels.numpy())
        with (self.folder / "paths.txt").open("w", encoding="utf-8") as paths:
            paths.writelines(f"{self.dataset.name(index)}\n" for index in range(len(self.dataset)))
        sizes = {file.name: file.stat().st_size for file in sorted(self.folder.iterdir())}
        write_json(self.folder / MANIFEST, {"identity": self.identity, "title": self.extractor.title, "bytes": sizes})

    def validate(self) -> str | None:
        """Return why the cache can be neither used nor continued; None if it can.

        Some images, evenly spaced over those that are done, are extracted again and compared.
        """
        if not self._intact():
            return "a file is missing, truncated or damaged, or an earlier version wrote it without checksums"
        if damaged := self._count_damaged():
            return f"the stored features of {pluralize(damaged, 'image')} are damaged (wrong checksums)"
        if not self._spot_checks_match():
            return (
                "cached features differ from those extracted again (an image was replaced, or another version of the "
                "program computes them differently)"
            )
        return None

    def complete(self) -> bool:
        """Return whether the files are intact and no image is pending."""
        return self._intact() and bool(self.state().all())

    def state(self) -> npt.NDArray[np.uint8]:
        """Read the state of each image (N,): PENDING, DONE or BROKEN."""
        state: npt.NDArray[np.uint8] = np.load(self.folder / "state.npy")
        return state

    def features(self, *, blocks: int) -> Features:
        """Return all features of the last blocks, float16, mapped from the files.

        If images are unreadable, the features of the others are copied into memory.

        Raises:
            UserError: No image can be read.
        """
        state = self.state()
        index = torch.from_numpy(np.flatnonzero(state == DONE))
        if not len(index):
            raise none_readable(self.skipped)
        cls, patch_mean = self._map("cls.npy")[:, -blocks:], self._map("patch_mean.npy")
        if len(index) < len(state):
            cls, patch_mean = cls[index], patch_mean[index]
        return Features(cls, patch_mean, self.dataset.labels[index], index)

    def broken(self) -> list[UnreadableImageError]:
        """Return the errors of the unreadable images."""
        indices = np.flatnonzero(self.state() == BROKEN)
        if not len(indices):
            return []
        lines = self.skipped.path.read_text(encoding="utf-8").splitlines()
        reasons = {name: reason for name, _, reason in (line.partition("\t") for line in lines)}
        return [UnreadableImageError(name, reasons[name]) for name in map(self.dataset.name, indices.tolist())]

    def _intact(self) -> bool:
        """Return whether all files exist and agree with the manifest."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["bytes"]}
            if manifest["identity"] != self.identity or sizes != manifest["bytes"]:
                return False
            for name, layout in self.arrays.items():
                array = np.load(self.folder / name, mmap_mode="r")
                if (array.shape, array.dtype.str) != layout:
                    return False
            self.broken()
            return bool(self.state().max() <= BROKEN)
        except (OSError, ValueError, LookupError, TypeError, EOFError):  # missing, truncated, or of another format
            return False

    def _count_damaged(self) -> int:
        """Count the images that are not pending and whose row, state included, does not have its checksum."""
        state, checksums = self.state(), np.load(self.folder / "checksums.npy")
        cls, patch_mean = (np.load(self.folder / name, mmap_mode="r") for name in ("cls.npy", "patch_mean.npy"))
        damaged = 0
        for start in range(0, len(state), _ROWS):
            rows = slice(start, start + _ROWS)
            wrong = row_checksums(state[rows], cls[rows], patch_mean[rows]) != checksums[rows]
            damaged += int((wrong & (state[rows] != PENDING)).sum())
        return damaged

    def _spot_checks_match(self) -> bool:
        """Return whether some images that are not pending have the same features when they are extracted again."""
        state = self.state()
        settled, broken = np.flatnonzero(state), np.flatnonzero(state == BROKEN)[:_SPOT_CHECKS]
        if not len(settled):
            return True
        spaced = settled[np.linspace(0, len(settled) - 1, _SPOT_CHECKS).round().astype(np.int64)]
        checked = np.union1d(spaced, broken)
        dataset = EvalDataset(self.dataset, self.extractor.transform, channels=self.extractor.channels)
        images, indices, _ = dataset.__getitems__(checked.tolist())
        if indices.tolist() != checked[state[checked] == DONE].tolist():
            return False
        if not len(indices):
            return True
        cls, patch_mean = (torch.cat(parts) for parts in zip(*self.extractor(images), strict=True))
        tolerance, cached = self.extractor.tolerance, self._map("cls.npy")[indices, -self.extractor.blocks :]
        return _close(cached, cls, tolerance) and _close(self._map("patch_mean.npy")[indices], patch_mean, tolerance)

    def _map(self, name: str) -> Tensor:
        # mode "c" (copy on write): torch has no read-only tensors
        return torch.from_numpy(np.load(self.folder / name, mmap_mode="c"))


def row_checksums(
    state: npt.NDArray[np.uint8], cls: npt.NDArray[np.float16], patch_mean: npt.NDArray[np.float16]
) -> npt.NDArray[np.uint32]:
    """Return the CRC-32 (B,) of rows that are DONE; of others, which have no values, of the state alone."""
    sums = [
        zlib.crc32(mean.tobytes(), zlib.crc32(tokens.tobytes(), kind)) if kind == DONE else zlib.crc32(bytes([kind]))
        for kind, tokens, mean in zip(state.tolist(), cls, patch_mean, strict=True)
    ]
    return np.array(sums, dtype=np.uint32)


def candidate_caches(
    extractor: FeatureExtractor, dataset: ImageDataset, *, folder: Path, name: str
) -> list[FeatureCache]:
    """Return the cache of these features, then the caches of more blocks, which contain them.

    They lie in `folder`; their names start with `name` and end in a hash of everything that determines the features.
    """
    common = {
        "schema": SCHEMA,
        "extractor": extractor.identity(),
        "images": dataset.fingerprint(sizes=True, times=True),
        "decoding": DECODING,
        "count": len(dataset),
        "dtype": "float16",
        **({} if dataset.value_range.is_auto else {"value_range": str(dataset.value_range)}),
    }
    caches = []
    for blocks in range(extractor.blocks, extractor.max_blocks + 1):
        identity = {**common, "blocks": blocks}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = folder / f"{name[:_MAX_NAME]}-{digest[:12]}"
        caches.append(FeatureCache(path, identity, extractor, dataset, blocks))
    return caches


def features_folder(folder: Path | None, run: Path | None) -> Path:
    """Return the parent folder of feature caches: the given one, else that of the run, else the user's cache.

    Where the run cannot be written to, it is the user's cache.
    """
    own, user = folder or (run / "eval" if run else cache_dir() or Path()) / "features", cache_dir()
    if folder is not None or run is None or user is None or _is_writable(own):
        return own
    log.warning(f"{own} cannot be written to: features are stored in {user / 'features'}")
    return user / "features"


def _is_writable(folder: Path) -> bool:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return os.access(existing, os.W_OK)


def _close(cached: Tensor, extracted: Tensor, tolerance: float) -> bool:
    """Return whether vectors (..., D) differ by at most this fraction of their length, infinite values aside."""
    cached, extracted = (values.half().float().nan_to_num(0, 0, 0) for values in (cached, extracted))
    return bool(((cached - extracted).norm(dim=-1) <= tolerance * extracted.norm(dim=-1)).all())
