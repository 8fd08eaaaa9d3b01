"""NT-Xent, the normalized temperature-scaled cross-entropy (SimCLR, arXiv 2002.05709, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.distributed import gather_with_gradient, rank


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, gather: bool = False) -> tuple[Tensor, Tensor]:
    """Find each embedding's other view among all embeddings but itself.

    L = 1/2B Σ_i -log[ exp(cos(z_i, z_i⁺)/τ) / Σ_{k≠i} exp(cos(z_i, z_k)/τ) ]

    Args:
        first: (B, D), the embeddings of view 1; not normalized.
        second: (B, D), of view 2, in the same order.
        temperature: τ, above 0.
        gather: Take the other processes' embeddings as negatives too, with gradient.

    Returns:
        The loss, in float32 or more, and the share of embeddings whose nearest other one is its positive; scalars.

    With equal embeddings everywhere the loss is ln(2B - 1).
    """
    z = F.normalize(torch.stack([upcast(first), upcast(second)], dim=1), dim=-1)  # (B, 2, D)
    everyone = gather_with_gradient(z) if gather else z  # (W·B, 2, D)
    start = 2 * len(z) * rank() if gather else 0
    rows, columns = z.flatten(0, 1), everyone.flatten(0, 1)  # (2B, D), (2WB, D); positives stand side by side
    place = start + torch.arange(len(rows), device=z.device)  # of each row among the columns
    with torch.autocast(rows.device.type, enabled=False):  # it would multiply in bfloat16
        similarity = rows @ columns.T / temperature  # (2B, 2WB)
    similarity = similarity.scatter(1, place[:, None], float("-inf"))
    positive = place ^ 1
    accuracy = (similarity.argmax(dim=1) == positive).float().mean()
    return F.cross_entropy(similarity, positive), accuracy
