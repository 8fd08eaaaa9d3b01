"""Compare kNN predictions, image by image, with a plain float64 implementation of DINO's protocol.

    PYTHONPATH=. python -m tests.benchmarks.verify_knn runs/cifar10_dino data/cifar10

CHECKPOINT and ROOT as in `ssl-vit knn`; ROOT holds train/ and test/. The features are extracted once.
Plain is NumPy in float64: all cosines of a query, a stable sort of them, the votes exp(cosine / 0.07) of the first k
summed by class. A row has the number of test images with the same prediction for an engine. For each that differs, a
line has the difference between the votes of the two best classes in float64, and between the last neighbor that votes
and the next one: float32 cannot resolve differences below about 1e-6.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.dataset_factory import build_labeled_splits
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.knn import LabeledFeatures, classify, search
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract, on_best_device
from ssl_vit.models.checkpoint import load_backbone

KS, TEMPERATURE = (1, 10, 20, 100, 200), 0.07


def main(checkpoint: str, root: Path) -> None:
    """Compare both engines with plain float64."""
    train, test = labeled(checkpoint, root)
    cosines, classes = plain(train, test)
    print(f"{len(test.labels):,} test images, {len(train.labels):,} x {train.features.shape[1]}")
    print(f"{'engine':<8}{'k':>5}{'same class':>14}{'accuracy':>10}{'in float64':>12}")
    for engine in ("torch", "faiss"):
        found = search(train, test, max_k=max(KS), engine=engine)
        predictions = classify(found, ks=KS, temperature=TEMPERATURE).predicted
        for k in KS:
            votes = plain_votes(cosines[:, :k], classes[:, :k], int(train.labels.max()) + 1)
            expected = votes.argmax(axis=1)
            ours, target = predictions[k].numpy(), test.labels.numpy()
            same = int((ours == expected).sum())
            accuracy, exact = np.mean(ours == target), np.mean(expected == target)
            print(f"{engine:<8}{k:>5}{same:>8,} of {len(target):,}{accuracy:>10.4f}{exact:>12.4f}")
            for query in np.flatnonzero(ours != expected):
                first, second = np.sort(votes[query])[::-1][:2]
                print(
                    f"    {query}: {ours[query]} for {expected[query]}; votes differ by "
                    f"{(first - second) / first:.1e} relative, neighbors {k} and {k + 1} by "
                    f"{cosines[query, k - 1] - cosines[query, k]:.1e}"
                )


def labeled(checkpoint: str, root: Path) -> list[LabeledFeatures]:
    """Extract the last [CLS] of the train and test images, as in `ssl-vit knn`."""
    loaded = on_best_device(load_backbone(checkpoint))
    sections = {"source": "folder", "range": None, "train": None, "test": None, "image_size": None, "crop_ratio": 0.875}
    data = EvalDataConfig(root=root, batch_size=256, num_workers="auto", **sections)
    transform = EvalTransform(loaded.backbone.config.img_size, data.crop_ratio, loaded.mean, loaded.std)
    extractor = BackboneExtractor(loaded, transform, blocks=1)
    settings = {"batch_size": data.batch_size, "num_workers": data.num_workers}
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for dataset in build_labeled_splits(data):
            if dataset is None:
                raise SystemExit(f"{root} does not contain train/ and test/")
            skipped = SkippedImageLog(Path(folder) / "skipped_images.txt")
            found = extract(extractor, dataset, **settings, skipped=skipped)
            parts.append(LabeledFeatures(found.cls[:, -1].float(), found.labels))
    return parts


def plain(train: LabeledFeatures, test: LabeledFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and classes (Q, max k + 1) of the nearest training images; among equal ones the first."""
    most = min(max(KS) + 1, len(train.labels))
    features, queries = (part.features.double().numpy() for part in (train, test))
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    cosines, classes = np.empty((len(queries), most)), np.empty((len(queries), most), dtype=np.int64)
    for row, query in enumerate(queries):
        similarity = features @ query  # (N,)
        order = np.argsort(-similarity, kind="stable")[:most]
        cosines[row], classes[row] = similarity[order], train.labels.numpy()[order]
    return cosines, classes


def plain_votes(cosines: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """Compute the votes (Q, count) of neighbors with these cosines and classes (Q, k)."""
    weights = np.exp(cosines / TEMPERATURE)
    return np.stack([np.where(classes == label, weights, 0.0).sum(axis=1) for label in range(count)], axis=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], Path(sys.argv[2]))
