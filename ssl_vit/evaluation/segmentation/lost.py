"""LOST (Siméoni et al. 2021, arXiv 2109.14279): the object grows from the patch that resembles the fewest others."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_vit.evaluation.segmentation.patch_mask import Segmentation, concatenated_keys, connected_component
from ssl_vit.models.attention_maps import LastBlockFeatures

EXPANSION = 100  # patches of lowest degree that may join the seed (k, section 3.3)
_ROWS = 512  # of the similarities that are computed at once


def lost_mask(features: LastBlockFeatures) -> Segmentation:
    """Segment an image by LOST, from the keys of the last block, which are not normalized.

    Two patches are joined where k_i · k_j > 0. The seed is the patch with the fewest others joined to it; those of the
    100 patches of lowest degree that are joined to the seed form the seed's set; the object is every patch whose
    similarities to the set sum to more than 0 and that is connected with the seed (sides, not corners). The score map
    is that sum of similarities, divided by its largest absolute value: -1 to 1.

    Among patches with equal degrees the first, row by row, comes first. Equal keys everywhere make the whole image the
    object; a single patch is the object; keys that are zero have none (an empty mask).
    """
    keys = concatenated_keys(features)  # (N, heads · d)
    order = _degrees(keys).argsort(stable=True)[:EXPANSION]
    seed = order[0]
    joined = order[keys[order] @ keys[seed] > 0]
    similarity = (keys @ keys[joined].sum(0)).view(features.keys.shape[1:3])  # sum over the set of k_i · k_s
    scores = similarity / similarity.abs().max().clamp_min(torch.finfo(similarity.dtype).tiny)
    return Segmentation(scores, connected_component(similarity > 0, int(seed)))


def _degrees(keys: Tensor) -> Tensor:
    """Count the patches that each patch is joined to (N,), without all similarities at once."""
    degrees = -(keys.square().sum(1) > 0).long()  # a patch does not count for itself
    for start in range(0, len(keys), _ROWS):
        degrees[start : start + _ROWS] += ((keys[start : start + _ROWS] @ keys.T) > 0).sum(1)
    return degrees
