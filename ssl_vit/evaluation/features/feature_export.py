"""Export cached features to one file: .npz for NumPy, .parquet for embedding viewers."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_vit.data.dataset import ImageDataset
from ssl_vit.evaluation.features.extractor import Features
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError

_ROWS = 8192  # written at a time, so that memory does not grow with the number of images


class FeatureSplit(NamedTuple):
    """The features of one dataset."""

    name: str  # train or test
    dataset: ImageDataset
    features: Features


def write_npz(path: Path, splits: Sequence[FeatureSplit]) -> None:
    """Write all features as arrays of M rows, one per readable image, split after split.

    `cls` (M, blocks, D) and `patch_mean` (M, D) float16, `labels` (M,) int64 with -1 for none, `splits` and `paths`
    (M,) strings, and `class_names` (C,), which labels index.
    """
    longest = max(len(split.dataset.name(index)) for split in splits for index in split.features.index.tolist())
    first, classes = splits[0].features, np.array(splits[0].dataset.classes, dtype=np.str_)
    columns: dict[str, tuple[str, tuple[int, ...], Callable[[FeatureSplit], npt.ArrayLike]]] = {  # dtype, shape, rows
        "cls": ("<f2", tuple(first.cls.shape[1:]), lambda split: split.features.cls),
        "patch_mean": ("<f2", tuple(first.patch_mean.shape[1:]), lambda split: split.features.patch_mean),
        "labels": ("<i8", (), lambda split: split.features.labels),
        "splits": ("<U5", (), lambda split: [split.name] * len(split.features.index)),
        "paths": (f"<U{longest}", (), _names),
    }
    count = sum(len(split.features.index) for split in splits)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, (dtype, shape, rows_of) in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                description = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(member, description)
                for chunk in _chunks(splits):
                    member.write(np.asarray(rows_of(chunk), dtype=dtype).tobytes())
        with archive.open("class_names.npy", "w") as member:
            np.lib.format.write_array(member, classes, allow_pickle=False)


def write_parquet(path: Path, splits: Sequence[FeatureSplit], *, pca: bool) -> None:
    """Write a table with a row per readable image.

    Columns: `path`, `split`, `label` and `class` (null where there is none), `embedding`, the last [CLS] as a list of D
    float32, and with `pca` `x` and `y`, its first two principal components. Check with `check_pyarrow` before.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {
        "path": pa.string(),
        "split": pa.string(),
        "label": pa.int64(),
        "class": pa.string(),
        "embedding": pa.list_(pa.float32()),
        **({"x": pa.float32(), "y": pa.float32()} if pca else {}),
    }
    mean, axes = principal_plane(splits) if pca else (None, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, pq.ParquetWriter(file, pa.schema(fields.items())) as writer:
        for chunk in _chunks(splits):
            labels, classes = chunk.features.labels.tolist(), chunk.dataset.classes
            embedding = chunk.features.cls[:, -1].float()  # (B, D)
            offsets = np.arange(len(labels) + 1, dtype=np.int32) * embedding.shape[1]
            columns: dict[str, Any] = {
                "path": _names(chunk),
                "split": [chunk.name] * len(labels),
                "label": [None if label < 0 else label for label in labels],
                "class": [None if label < 0 else classes[label] for label in labels],
                "embedding": pa.ListArray.from_arrays(offsets, embedding.flatten().numpy()),
            }
            if mean is not None and axes is not None:
                columns["x"], columns["y"] = ((embedding - mean) @ axes).T.numpy()
            writer.write_table(pa.table(columns, schema=pa.schema(fields.items())))


def check_pyarrow() -> None:
    """Raise a UserError if pyarrow is not installed, before time is spent on extraction."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError("to=parquet needs pyarrow; install it with `pip install 'ssl-vit[parquet]'`") from None


def principal_plane(splits: Sequence[FeatureSplit]) -> tuple[Tensor, Tensor]:
    """Compute the mean (D,) and the first two principal axes (D, 2) of the last [CLS] of all splits, in chunks.

    The sign of an axis is chosen so that its entry of largest magnitude is positive.
    """
    count, total, products = 0, torch.zeros(1), torch.zeros(1)
    for chunk in _chunks(splits):
        x = chunk.features.cls[:, -1].double()
        count, total, products = count + len(x), total + x.sum(dim=0), products + x.T @ x
    mean = total / count
    axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))[1][:, [-1, -2]]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return mean.float(), (axes * largest.sign()).float()


def _chunks(splits: Sequence[FeatureSplit]) -> Iterator[FeatureSplit]:
    """Yield the splits in chunks of at most `_ROWS` images."""
    for split in splits:
        for start in range(0, len(split.features.index), _ROWS):
            yield split._replace(features=split.features.take(slice(start, start + _ROWS)))


def _names(split: FeatureSplit) -> list[str]:
    return [split.dataset.name(index) for index in split.features.index.tolist()]
