"""The DINO loss (Caron et al. 2021, arXiv 2104.14294, algorithm 1 and `main_dino.DINOLoss`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit.distributed import all_mean, all_sum, world_size
from ssl_vit.precision import at_least_float32


def dino_loss(student_logits: Tensor, teacher_probabilities: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy between the teacher's view i and the student's view v, over all pairs with i ≠ v.

    Args:
        student_logits: (V, B, K), the global views first.
        teacher_probabilities: (G, B, K), softmaxed, without gradient; G ≤ V global views.
        temperature: Of the student, above 0.

    Returns:
        Scalar, in float32 or more. With V views there are G·V - G pairs.
    """
    log_p = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)  # (V, B, K)
    globals_, (views, batch, _) = len(teacher_probabilities), log_p.shape
    every_teacher = teacher_probabilities.sum(dim=0)  # (B, K)
    other_teachers = every_teacher - teacher_probabilities  # (G, B, K): a global view is not compared with itself
    log_likelihood = (other_teachers * log_p[:globals_]).sum() + (every_teacher * log_p[globals_:]).sum()
    return -log_likelihood / (batch * (globals_ * views - globals_))


class Center(nn.Module):
    """The running mean of the teacher's logits, which keeps any one prototype from taking over.

    center ← momentum · center + (1 - momentum) · mean of the logits (G·B, K) over all processes, once per optimizer
    step: `observe` adds up the logits of the micro-batches, `update` takes them in. The center of a step is that of
    the steps before it.
    """

    value: Tensor
    seen: Tensor
    count: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))  # (K,)
        self.register_buffer("seen", torch.zeros(prototypes), persistent=False)  # (K,) sum of logits since `update`
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def observe(self, teacher_logits: Tensor) -> None:
        """Add the logits (G, B, K) of a micro-batch."""
        self.seen += teacher_logits.sum(dim=(0, 1), dtype=self.seen.dtype)
        self.count += teacher_logits.shape[0] * teacher_logits.shape[1]

    @torch.no_grad()
    def update(self) -> None:
        """Move the center by what was observed since the last update."""
        mean = all_sum(self.seen) / (self.count * world_size())
        self.value.lerp_(mean, 1 - self.momentum)
        self.forget()

    def forget(self) -> None:
        """Drop what was observed since the last update."""
        self.seen.zero_()
        self.count.zero_()


def sharpen(teacher_logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature) over K, in float32 or more, without gradient: (G, B, K)."""
    return F.softmax((at_least_float32(teacher_logits.detach()) - center) / temperature, dim=-1)


class Assignment(NamedTuple):
    """How the teacher spreads pictures over prototypes, in nats; each a scalar."""

    entropy: Tensor  # of one picture's probabilities, mean; 0 = one prototype, ln K = uniform
    kl_to_uniform: Tensor  # ln K - entropy
    information: Tensor  # entropy of the mean assignment - entropy; 0 = the same answer for every picture: collapse


def assignment(teacher_probabilities: Tensor) -> Assignment:
    """Entropy of the teacher's probabilities (G, B, K) and the information that they carry about the picture.

    In both collapses, to the uniform answer and to a single prototype, the information goes to 0. It is at most
    ln(G·B), because it is estimated on one batch, that of all processes together. Entropy and divergence are this
    process's own: their mean over processes is that of the whole batch.
    """
    p = teacher_probabilities.flatten(0, 1)  # (G·B, K)
    entropy = torch.special.entr(p).sum(-1).mean()
    information = torch.special.entr(all_mean(p.mean(0))).sum() - entropy
    return Assignment(entropy, math.log(p.shape[-1]) - entropy, information)
