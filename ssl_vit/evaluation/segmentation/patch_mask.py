"""Masks of patches found without labels: what the methods share, and LOST and FOUND, which start from a seed patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ssl_vit.models.attention_maps import LastBlockFeatures
from ssl_vit.runtime.errors import UserError

EXPANSION = 100  # LOST's k (section 3.3): patches of lowest degree that may join the seed
TAU = 0.3  # of FOUND: cosine above which a patch belongs to the background
_EPS = 1e-10
_ROWS = 512  # of the similarities that are computed at once


class Segmentation(NamedTuple):
    """Foreground of an image, patch by patch."""

    score_map: Tensor  # (rows, columns) float32; higher is foreground, above 0 before connected parts are selected
    mask: Tensor  # (rows, columns) bool


Segmenter = Callable[[LastBlockFeatures], Segmentation]


def concatenated_keys(features: LastBlockFeatures) -> Tensor:
    """Return the keys (N, heads · d) of an image's patches, row by row, the heads side by side."""
    return features.keys.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def connected_component(mask: Tensor, seed: int) -> Tensor:
    """Return the part of a mask (rows, columns) bool that is connected with patch number `seed` by sides of patches.

    Patches are counted row by row. The result is empty if the seed is not in the mask.

    Example:
        >>> connected_component(torch.tensor([[True, True, False], [False, False, True]]), 1)
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    labels = torch.from_numpy(ndimage.label(mask.numpy())[0])
    return mask & (labels == labels.flatten()[seed])


def lost_mask(features: LastBlockFeatures) -> Segmentation:
    """Segment an image by LOST (Siméoni et al. 2021, arXiv 2109.14279), from the keys, which are not normalized.

    Two patches are joined where k_i · k_j > 0. The seed is the patch with the fewest others joined to it; those of the
    100 patches of lowest degree that are joined to the seed form the seed's set; the object is every patch whose
    similarities to the set sum to more than 0 and that is connected with the seed (sides, not corners). The score map
    is that sum of similarities, divided by its largest absolute value: -1 to 1.

    Among patches with equal degrees the first, row by row, comes first. Equal keys everywhere make the whole image the
    object; a single patch is the object; keys that are zero have none (an empty mask).
    """
    keys = concatenated_keys(features)  # (N, heads · d)
    degrees = -(keys.square().sum(1) > 0).long()  # (N,): a patch does not count for itself
    for start in range(0, len(keys), _ROWS):
        degrees[start : start + _ROWS] += ((keys[start : start + _ROWS] @ keys.T) > 0).sum(1)
    order = degrees.argsort(stable=True)[:EXPANSION]
    seed = order[0]
    joined = order[keys[order] @ keys[seed] > 0]
    similarity = (keys @ keys[joined].sum(0)).view(features.keys.shape[1:3])  # sum over the set of k_i · k_s
    scores = similarity / similarity.abs().max().clamp_min(torch.finfo(similarity.dtype).tiny)
    return Segmentation(scores, connected_component(similarity > 0, int(seed)))


def found_mask(features: LastBlockFeatures) -> Segmentation:
    """Segment an image by the first stage of FOUND (Siméoni et al. 2023, arXiv 2212.07834), which is not trained.

    The background's seed is the patch with the least attention of [CLS], the heads weighted by `sparsity_weights`.
    Background are the patches whose keys, each head's multiplied by its weight, have a cosine above 0.3 with the
    seed's (section 3.1). The score map is 0.3 minus that cosine: -0.7 to 1.3. The mask is where it is not negative; it
    may have several parts.

    The paper takes attention as it leaves the softmax; here each head's sums to 1 over the patches. Among patches with
    equally little attention the first, row by row, is the seed. Equal keys everywhere are all background (an empty
    mask), as is a single patch. Keys that are zero resemble nothing, not even the seed.

    Raises:
        UserError: The model has no class token.
    """
    if features.cls is None:
        raise UserError("found needs a model with a class token; lost, tokencut and pca need none")
    weights = sparsity_weights(features.cls)[:, None, None]  # (heads, 1, 1)
    seed = (features.cls * weights).sum(0).flatten().argmin()
    weighted = (features.keys * weights[..., None]).permute(1, 2, 0, 3).flatten(-2)  # (rows, columns, heads · d)
    keys = F.normalize(weighted, dim=-1)
    scores = TAU - keys @ keys.flatten(0, 1)[seed]
    return Segmentation(scores, scores >= 0)


def sparsity_weights(attention: Tensor) -> Tensor:
    """Compute the weight (heads,) of each head of [CLS] attention (heads, rows, columns), not negative.

    It is log(sum of all heads' shares / the head's share), where a share is that of the patches with more attention
    than the mean over all heads and patches: the fewer patches, the larger. A single head has weight 1.

    Example:
        >>> sparsity_weights(torch.tensor([[[0.9, 0.1, 0.0, 0.0]], [[0.4, 0.3, 0.3, 0.0]]]))
        tensor([1.3863, 0.2877])
    """
    if len(attention) == 1:
        return torch.ones(1)
    shares = (attention > attention.mean()).float().mean((1, 2)) + _EPS
    return torch.log(shares.sum() / shares)
