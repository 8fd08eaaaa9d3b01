"""Feature map: features projected to a plane by principal components or t-SNE."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.data.dataset import UnreadableImageError, evenly_spaced
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.image_grid import fit_size, to_pil
from ssl_vit.visualization.report.image_sources import FeatureImages
from ssl_vit.visualization.report.nearest_images import tile
from ssl_vit.visualization.report.schema import FeatureMap

SIDE = 40  # pixels of a thumbnail


def embedding_map(known: FeatureImages, *, points: int, projection: Literal["pca", "tsne"], seed: int) -> FeatureMap:
    """At most so many images, evenly spread, where their features put them.

    Raises:
        UserError: There are too few images, or scikit-learn is missing.
    """
    part = known.asked or known.bank
    features = part.features.take(evenly_spaced(len(part.features.index), points))
    images, rows = [], []
    for row, place in enumerate(features.index.tolist()):
        try:
            image = tile(part.dataset, place, SIDE)
        except UnreadableImageError:
            continue
        rows.append(row)
        images.append(to_pil(image, fit_size(image, min(SIDE, max(image.shape[-2:])))))
    if len(rows) < 3:
        raise UserError("Fewer than three images can be read: there is nothing to spread over a plane.")
    kept = features.take(torch.tensor(rows))
    vectors = F.normalize(kept.cls[:, -1].float(), dim=1)
    placed, text = principal(vectors) if projection == "pca" else _tsne(vectors, seed)
    names = [part.dataset.name(place) for place in kept.index.tolist()]
    text = f"{text} {len(rows):,} images, evenly spread; [CLS] of the last block, scaled to length 1."
    return FeatureMap(placed, kept.labels, part.dataset.classes, names, images, text)


def principal(vectors: Tensor) -> tuple[Tensor, str]:
    """Compute the first two principal components (N, 2) of vectors (N, D), and their share of the variance.

    Their signs are those that make each component's third moment positive, so that they do not depend on the machine.
    """
    centerd = (vectors - vectors.mean(dim=0)).double()
    left, values, _ = torch.linalg.svd(centerd, full_matrices=False)  # (N, R), (R,)
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
