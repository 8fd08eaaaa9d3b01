"""Features on disk: plain .npy files in a folder of their own, mapped into memory where they are used."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError
from ssl_vit.data.loading.multicrop_dataset import EvalDataset
from ssl_vit.data.sources.image_index import cache_dir
from ssl_vit.evaluation.features.extractor import FeatureExtractor, Features, none_readable
from ssl_vit.runtime.atomic_io import write_json

SCHEMA = 1  # of such a folder
TO_DO, DONE, BROKEN = 0, 1, 2  # what state.npy says of an image
MANIFEST = "manifest.json"
_SPOTS = 16  # images that are described again before what is stored of all is used
_LONGEST_NAME = 100  # characters of the data's name in the folder's


class Array(NamedTuple):
    """One of the .npy files."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def header(self) -> bytes:
        """What stands in the file before the values."""
        buffer = io.BytesIO()
        about = {"descr": self.dtype, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(buffer, about)
        return buffer.getvalue()

    @property
    def row_bytes(self) -> int:
        """Of one image's values."""
        return prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Of the file."""
        return len(self.header) + self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class FeatureCache:
    """What a describer says of the N images of a set.

    The folder holds `cls.npy` (N, blocks, D) and `patch_mean.npy` (N, D) float16, `labels.npy` (N,) int64, `state.npy`
    (N,) uint8 (0 to do, 1 done, 2 cannot be read), `paths.txt` with a name a line, `skipped_images.txt`, and `manifest.json`,
    which is written last. Values beyond 65,504 become infinite, which `validate_features` refuses in words: no healthy
    model has such features behind its final norm.
    """

    folder: Path
    identity: dict[str, Any]  # all that decides over what it holds, as plain containers
    describe: FeatureExtractor
    dataset: ImageDataset
    blocks: int  # that it holds, at least those of `describe`

    @property
    def arrays(self) -> dict[str, Array]:
        """The files but the texts."""
        count, (width, patch_width) = len(self.dataset), self.describe.shape
        return {
            "cls.npy": Array((count, self.blocks, width), "<f2"),
            "patch_mean.npy": Array((count, patch_width), "<f2"),
            "labels.npy": Array((count,), "<i8"),
            "state.npy": Array((count,), "|u1"),
        }

    @property
    def skipped(self) -> SkippedImageLog:
        """The list of the images that cannot be read."""
        return SkippedImageLog(self.folder / "skipped_images.txt")

    def create(self) -> None:
        """Make the folder anew, with nothing done; its files have their sizes from the beginning."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, array in self.arrays.items():
            with (self.folder / name).open("wb") as file:
                file.write(array.header)
                file.truncate(array.bytes)  # zeros, which take no room yet
        np.save(self.folder / "labels.npy", self.dataset.labels.numpy())
        with (self.folder / "paths.txt").open("w", encoding="utf-8") as paths:
            paths.writelines(f"{self.dataset.name(index)}\n" for index in range(len(self.dataset)))
        sizes = {file.name: file.stat().st_size for file in sorted(self.folder.iterdir())}
        write_json(self.folder / MANIFEST, {"identity": self.identity, "title": self.describe.title, "bytes": sizes})

    def problem(self) -> str | None:
        """Why what is stored cannot be used, or gone on with; None if it can.

        Some images, spread over those that were described, are described again for it.
        """
        if not self._whole():
            return "a file is missing, cut off or damaged"
        if not self._agrees():
            return (
                "images that were described again are not what is stored of them (an image was replaced, or "
                "another version of the program computes otherwise)"
            )
        return None

    def complete(self) -> bool:
        """Whether nothing is left to do, as far as the files tell."""
        return self._whole() and bool(self.state().all())

    def state(self) -> npt.NDArray[np.uint8]:
        """What became of each image (N,): TO_DO, DONE or BROKEN; read anew each time."""
        array = self.arrays["state.npy"]
        content = (self.folder / "state.npy").read_bytes()
        return np.frombuffer(content, dtype=array.dtype, offset=len(array.header))

    def features(self, *, blocks: int) -> Features:
        """All features, of the last blocks, float16 mapped from the files.

        Where images are missing, those of the others are copied into memory.

        Raises:
            UserError: No image can be read.
        """
        state = self.state()
        index = torch.from_numpy(np.flatnonzero(state == DONE))
        if not len(index):
            raise none_readable(self.skipped)
        cls, patch_mean = self._mapped("cls.npy")[:, -blocks:], self._mapped("patch_mean.npy")
        if len(index) < len(state):
            cls, patch_mean = cls[index], patch_mean[index]
        return Features(cls, patch_mean, self.dataset.labels[index], index)

    def broken(self) -> list[UnreadableImageError]:
        """The images that cannot be read."""
        places = np.flatnonzero(self.state() == BROKEN)
        if not len(places):
            return []
        lines = self.skipped.path.read_text(encoding="utf-8").splitlines()
        reasons = {name: reason for name, _, reason in (line.partition("\t") for line in lines)}
        return [UnreadableImageError(name, reasons[name]) for name in map(self.dataset.name, places.tolist())]

    def _whole(self) -> bool:
        """Whether all files are there, and what the manifest says they are."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["bytes"]}
            if manifest["identity"] != self.identity or sizes != manifest["bytes"]:
                return False
            for name, array in self.arrays.items():
                with (self.folder / name).open("rb") as file:
                    if sizes[name] != array.bytes or file.read(len(array.header)) != array.header:
                        return False
            self.broken()
            return bool(self.state().max() <= BROKEN)
        except (OSError, ValueError, LookupError, TypeError):  # absent, cut off, or of something else
            return False

    def _agrees(self) -> bool:
        """Whether images of which something is stored are the same still, to the model as it is now."""
        state = self.state()
        settled, broken = np.flatnonzero(state), np.flatnonzero(state == BROKEN)[:_SPOTS]
        if not len(settled):
            return True
        spread = settled[np.linspace(0, len(settled) - 1, _SPOTS).round().astype(np.int64)]
        spots = np.union1d(spread, broken)
        whole = EvalDataset(self.dataset, self.describe.transform, channels=self.describe.channels)
        images, places, _ = whole.__getitems__(spots.tolist())
        if places.tolist() != spots[state[spots] == DONE].tolist():
            return False
        if not len(places):
            return True
        cls, patch_mean = (torch.cat(parts) for parts in zip(*self.describe(images), strict=True))
        tolerance = self.describe.tolerance()
        return _near(self._mapped("cls.npy")[places, -self.describe.blocks :], cls, tolerance) and _near(
            self._mapped("patch_mean.npy")[places], patch_mean, tolerance
        )

    def _mapped(self, name: str) -> Tensor:
        # "c": what would be written stays in memory; torch has no tensors that cannot be written to
        return torch.from_numpy(np.load(self.folder / name, mmap_mode="c"))


def candidate_caches(
    describe: FeatureExtractor, dataset: ImageDataset, *, folder: Path, name: str
) -> list[FeatureCache]:
    """The store that these features belong into, then those of more blocks, which would serve as well.

    Args:
        describe: What says something of the images.
        dataset: Of which it is said.
        folder: Holds a folder for each store.
        name: Begins its name, which ends in a hash of all that decides over the features.
    """
    stores = []
    common = {
        "schema": SCHEMA,
        "describer": describe.identity(),
        "images": dataset.fingerprint(sizes=True, times=True),
        "count": len(dataset),
        "dtype": "float16",
    }
    for blocks in range(describe.blocks, describe.most_blocks + 1):
        identity = {**common, "blocks": blocks}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = folder / f"{name[:_LONGEST_NAME]}-{digest[:12]}"
        stores.append(FeatureCache(path, identity, describe, dataset, blocks))
    return stores


def features_folder(chosen: Path | None, run: Path | None) -> Path:
    """Where features are stored: the chosen folder, else within the run, else in the user's cache folder."""
    if chosen:
        return chosen
    return (run / "eval" if run else cache_dir() or Path()) / "features"


def _near(stored: Tensor, found: Tensor, tolerance: float) -> bool:
    """Whether vectors (..., D) of both differ by at most this share of their lengths; what is infinite is left out."""
    stored, found = (values.half().float().nan_to_num(0, 0, 0) for values in (stored, found))
    return bool(((stored - found).norm(dim=-1) <= tolerance * found.norm(dim=-1)).all())
