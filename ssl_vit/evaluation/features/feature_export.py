"""Stored features as one file for other tools: .npz for NumPy, .parquet for viewers of embeddings."""

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

_ROWS = 8192  # written at a time, so that the memory in use does not grow with the features


class FeatureSplit(NamedTuple):
    """The features of one dataset."""

    name: str  # train or test
    dataset: ImageDataset
    features: Features


def write_npz(path: Path, parts: Sequence[FeatureSplit]) -> None:
    """Write all features as arrays of M rows, one per readable image, the parts behind one another.

    `cls` (M, blocks, D) and `patch_mean` (M, D) float16, `labels` (M,) int64 with -1 for none, `parts` and `paths`
    (M,) texts, and `class_names` (C,), where labels are places.
    """
    longest = max(len(part.dataset.name(place)) for part in parts for place in part.features.index.tolist())
    first, names = parts[0].features, np.array(parts[0].dataset.classes, dtype=np.str_)
    columns: dict[
        str, tuple[str, tuple[int, ...], Callable[[FeatureSplit], npt.ArrayLike]]
    ] = {  # type, shape of a row, rows
        "cls": ("<f2", tuple(first.cls.shape[1:]), lambda part: part.features.cls),
        "patch_mean": ("<f2", tuple(first.patch_mean.shape[1:]), lambda part: part.features.patch_mean),
        "labels": ("<i8", (), lambda part: part.features.labels),
        "parts": ("<U5", (), lambda part: [part.name] * len(part.features.index)),
        "paths": (f"<U{longest}", (), _names),
    }
    count = sum(len(part.features.index) for part in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, (dtype, shape, rows_of) in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                about = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(member, about)
                for piece in _pieces(parts):
                    member.write(np.asarray(rows_of(piece), dtype=dtype).tobytes())
        with archive.open("class_names.npy", "w") as member:
            np.lib.format.write_array(member, names, allow_pickle=False)


def write_parquet(path: Path, parts: Sequence[FeatureSplit], *, pca: bool) -> None:
    """Write a table with a row per readable image, in groups of some thousand.

    Columns: `path`, `part`, `label` and `class` (null where there is none), `embedding`, the last [CLS] as a list of D
    float32, and with `pca` `x` and `y`, its first two principal components.

    Raises:
        UserError: pyarrow is not installed.
    """
    check_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {
        "path": pa.string(),
        "part": pa.string(),
        "label": pa.int64(),
        "class": pa.string(),
        "embedding": pa.list_(pa.float32()),
        **({"x": pa.float32(), "y": pa.float32()} if pca else {}),
    }
    mean, axes = principal_plane(parts) if pca else (None, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, pq.ParquetWriter(file, pa.schema(fields.items())) as writer:
        for part in _pieces(parts):
            labels, classes = part.features.labels.tolist(), part.dataset.classes
            embedding = part.features.cls[:, -1].float()  # (B, D)
            columns: dict[str, Any] = {
                "path": _names(part),
                "part": [part.name] * len(labels),
                "label": [None if label < 0 else label for label in labels],
                "class": [None if label < 0 else classes[label] for label in labels],
                "embedding": pa.ListArray.from_arrays(
                    np.arange(len(labels) + 1, dtype=np.int32) * embedding.shape[1], embedding.flatten().numpy()
                ),
            }
            if mean is not None and axes is not None:
                columns["x"], columns["y"] = ((embedding - mean) @ axes).T.numpy()
            writer.write_table(pa.table(columns, schema=pa.schema(fields.items())))


def check_pyarrow() -> None:
    """See that parquet can be written, before hours are spent on what shall be.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError("to=parquet needs pyarrow: install it by `pip install 'ssl-vit[parquet]'`") from None


def principal_plane(parts: Sequence[FeatureSplit]) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the first two principal axes (D, 2) of the last [CLS] of all parts, read some at a time.

    Of the two directions of an axis it is the one whose largest entry is positive.
    """
    count, total, products = 0, torch.zeros(1), torch.zeros(1)
    for part in _pieces(parts):
        x = part.features.cls[:, -1].double()
        count, total, products = count + len(x), total + x.sum(dim=0), products + x.T @ x
    mean = total / count
    axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))[1][:, [-1, -2]]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return mean.float(), (axes * largest.sign()).float()


def _pieces(parts: Sequence[FeatureSplit]) -> Iterator[FeatureSplit]:
    """The parts, some rows at a time."""
    for part in parts:
        for start in range(0, len(part.features.index), _ROWS):
            some = part.features
            rows = slice(start, start + _ROWS)
            yield part._replace(
                features=Features(some.cls[rows], some.patch_mean[rows], some.labels[rows], some.index[rows])
            )


def _names(part: FeatureSplit) -> list[str]:
    return [part.dataset.name(index) for index in part.features.index.tolist()]
