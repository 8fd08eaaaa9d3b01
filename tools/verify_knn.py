"""Compare kNN's answers, image by image, with a plain float64 implementation of DINO's protocol.

    python tools/verify_knn.py runs/cifar10_dino data/cifar10

CHECKPOINT and ROOT as in `ssl-vit knn`; ROOT holds train/ and test/. The features, taken once, are the same for all.
Plain is NumPy in float64: all cosines of a query, a stable sort of them, the votes exp(cosine / 0.07) of the first k
added up class by class. A row says of how many test images an engine answers the same class as that. Of each that
differs a line says how near to each other the two most voted classes are in float64, and how far apart the last
neighbor that votes and the first that does not: float32 cannot tell apart what differs by less than about 1e-6.
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
from ssl_vit.evaluation.features.extractor import extract, on_best_device
from ssl_vit.models.checkpoint import load_backbone

KS, TEMPERATURE = (1, 10, 20, 100, 200), 0.07


def main(checkpoint: str, root: Path) -> None:
    """Both engines against plain float64."""
    train, test = labeled(checkpoint, root)
    cosines, classes = plain(train, test)
    print(f"{len(test.labels):,} test images, {len(train.labels):,} x {train.features.shape[1]}")
    print(f"{'engine':<8}{'k':>5}{'same answer':>14}{'accuracy':>10}{'in float64':>12}")
    for engine in ("torch", "faiss"):
        found = search(train, test, max_k=max(KS), engine=engine)
        answers = classify(found, ks=KS, temperature=TEMPERATURE).predicted
        for k in KS:
            votes = plain_votes(cosines[:, :k], classes[:, :k], int(train.labels.max()) + 1)
            expected = votes.argmax(axis=1)
            ours, truth = answers[k].numpy(), test.labels.numpy()
            same = int((ours == expected).sum())
            right, known = np.mean(ours == truth), np.mean(expected == truth)
            print(f"{engine:<8}{k:>5}{same:>8,} of {len(truth):,}{right:>10.4f}{known:>12.4f}")
            for query in np.flatnonzero(ours != expected):
                first, second = np.sort(votes[query])[::-1][:2]
                print(
                    f"    {query}: {ours[query]} for {expected[query]}; their votes differ by "
                    f"{(first - second) / first:.1e} of them, neighbors {k} and {k + 1} by "
                    f"{cosines[query, k - 1] - cosines[query, k]:.1e}"
                )


def labeled(checkpoint: str, root: Path) -> list[LabeledFeatures]:
    """The last block's [CLS] of the training and test images, as `ssl-vit knn` takes them."""
    loaded = on_best_device(load_backbone(checkpoint))
    sections = {"source": "folder", "train": None, "test": None, "image_size": None, "crop_ratio": 0.875}
    data = EvalDataConfig(root=root, batch_size=256, num_workers="auto", **sections)
    transform = EvalTransform(loaded.backbone.config.img_size, data.crop_ratio, loaded.mean, loaded.std)
    how = {"blocks": 1, "batch_size": data.batch_size, "workers": data.num_workers}
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for dataset in build_labeled_splits(data):
            if dataset is None:
                raise SystemExit(f"{root} holds no train/ and test/")
            found = extract(
                loaded, dataset, transform, **how, skipped=SkippedImageLog(Path(folder) / "skipped_images.txt")
            )
            parts.append(LabeledFeatures(found.cls[:, -1].float(), found.labels))
    return parts


def plain(train: LabeledFeatures, test: LabeledFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and classes (Q, max k + 1) of the nearest training images; of equally near ones the first."""
    most = min(max(KS) + 1, len(train.labels))
    bank, queries = (part.features.double().numpy() for part in (train, test))
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    cosines, classes = np.empty((len(queries), most)), np.empty((len(queries), most), dtype=np.int64)
    for row, query in enumerate(queries):
        similarity = bank @ query  # (N,)
        order = np.argsort(-similarity, kind="stable")[:most]
        cosines[row], classes[row] = similarity[order], train.labels.numpy()[order]
    return cosines, classes


def plain_votes(cosines: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """The votes (Q, count) of neighbors with these cosines and classes (Q, k)."""
    weights = np.exp(cosines / TEMPERATURE)
    return np.stack([np.where(classes == label, weights, 0.0).sum(axis=1) for label in range(count)], axis=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], Path(sys.argv[2]))
