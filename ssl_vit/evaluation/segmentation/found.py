"""FOUND, first stage (Siméoni et al. 2023, arXiv 2212.07834): foreground is what does not resemble the background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.models.attention_maps import LastBlockFeatures
from ssl_vit.runtime.errors import UserError

TAU = 0.3  # cosine above which a patch belongs to the background
_EPS = 1e-10


def found_mask(features: LastBlockFeatures) -> Segmentation:
    """Segment an image by FOUND's first stage, which is not trained and needs a class token.

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
    """Compute the weight of each head (heads,): the larger, the fewer patches it attends to.

    It is log(sum of all heads' shares / the head's share), where a share is that of the patches with more attention
    than the mean over all heads and patches. A single head has weight 1.

    Args:
        attention: (heads, rows, columns) of [CLS], not negative.

    Example:
        >>> sparsity_weights(torch.tensor([[[0.9, 0.1, 0.0, 0.0]], [[0.4, 0.3, 0.3, 0.0]]]))
        tensor([1.3863, 0.2877])
    """
    if len(attention) == 1:
        return torch.ones(1)
    shares = (attention > attention.mean()).float().mean((1, 2)) + _EPS
    return torch.log(shares.sum() / shares)
