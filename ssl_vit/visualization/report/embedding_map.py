"""Feature map: features projected to a plane by principal components or t-SNE."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.dataset import UnreadableImageError, evenly_spaced
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.report.feature_images import FeatureImages, read_thumbnail
from ssl_vit.visualization.report.report_data import EmbeddingMap

SIDE = 40  # pixels of a thumbnail


def embedding_map(images: FeatureImages, config: ReportConfig) -> EmbeddingMap:
    """Project the features of at most `config.points` evenly spaced images.

    Raises:
        UserError: There are too few images, or scikit-learn is missing.
    """
    split = images.queries or images.index_set
    features = split.features.take(evenly_spaced(len(split.features.index), config.points))
    thumbnails, rows = [], []
    for row, index in enumerate(features.index.tolist()):
        try:
            thumbnails.append(read_thumbnail(split.dataset, index, SIDE))
        except UnreadableImageError:
            continue
        rows.append(row)
    if len(rows) < 3:
        raise UserError("Fewer than three images can be read: there is nothing to spread over a plane.")
    kept = features.take(torch.tensor(rows))
    vectors = F.normalize(kept.cls[:, -1].float(), dim=1)
    points, text = _pca(vectors) if config.projection == "pca" else _tsne(vectors, config.seed)
    names = [split.dataset.name(index) for index in kept.index.tolist()]
    text = f"{text} {len(rows):,} images, evenly spread; [CLS] of the last block, scaled to length 1."
    return EmbeddingMap(points, kept.labels, split.dataset.classes, names, thumbnails, text)


def _pca(vectors: Tensor) -> tuple[Tensor, str]:
    """Compute the first two principal components (N, 2) of vectors (N, D), and their share of the variance.

    Their signs are those that make each component's third moment positive, so that they do not depend on the machine.
    """
    centered = (vectors - vectors.mean(dim=0)).double()
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)  # (N, R), (R,)
    points = left[:, :2] * values[:2]
    points = points * torch.where((points**3).sum(dim=0) < 0, -1.0, 1.0)
    shares = values[:2] ** 2 / (values**2).sum()
    text = f"The two principal components, with {100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of the variance."
    return points.float(), text


def _tsne(vectors: Tensor, seed: int) -> tuple[Tensor, str]:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("projection=tsne needs scikit-learn: pip install 'ssl-vit[report]'") from None
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(vectors.numpy())
    text = f"t-SNE (perplexity {perplexity:.3g}, seed {seed}): who is near whom is kept, distances mean little."
    return torch.from_numpy(np.asarray(points, dtype=np.float32)), text
