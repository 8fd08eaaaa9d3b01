"""NT-Xent, the normalized temperature-scaled cross-entropy (SimCLR, arXiv 2002.05709, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.distributed import gather_with_gradient, rank


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, gather: bool = False) -> tuple[Tensor, Tensor]:
    """Compute the loss of identifying each embedding's other view among all other embeddings.

    L = 1/2B Σ_i -log[ exp(cos(z_i, z_i⁺)/τ) / Σ_{k≠i} exp(cos(z_i, z_k)/τ) ]

    Args:
        first: (B, D), the embeddings of view 1; not normalized.
        second: (B, D), of view 2, in the same order.
        temperature: τ, above 0.
        gather: Also use the embeddings of the other processes as negatives, with gradient.

    Returns:
        The loss, in float32 or float64, and the fraction of embeddings whose nearest neighbor is their positive;
        scalars. If all embeddings are equal the loss is ln(2B - 1).
    """
    z = F.normalize(torch.stack([upcast(first), upcast(second)], dim=1), dim=-1)  # (B, 2, D)
    gathered = gather_with_gradient(z) if gather else z  # (W·B, 2, D)
    start = 2 * len(z) * rank() if gather else 0
    rows, columns = z.flatten(0, 1), gathered.flatten(0, 1)  # (2B, D), (2WB, D); positives are adjacent
    index = start + torch.arange(len(rows), device=z.device)  # of each row among the columns
    with torch.autocast(rows.device.type, enabled=False):  # it would multiply in bfloat16
        similarity = rows @ columns.T / temperature  # (2B, 2WB)
    similarity = similarity.scatter(1, index[:, None], float("-inf"))
    positive = index ^ 1
    accuracy = (similarity.argmax(dim=1) == positive).float().mean()
    return F.cross_entropy(similarity, positive), accuracy
