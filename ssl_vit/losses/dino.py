"""The DINO loss (Caron et al. 2021, arXiv 2104.14294, algorithm 1 and `main_dino.DINOLoss`), block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_vit.runtime.device import upcast
from ssl_vit.runtime.distributed import all_reduce_mean, all_reduce_sum, world_size

# Entries of a block of logits: on a CPU they fit a core's cache, on a GPU they take 256 MiB.
_CPU_BLOCK, _GPU_BLOCK, _MIN_COLUMNS = 1 << 19, 1 << 26, 256


class FactoredLogits(NamedTuple):
    """Logits (N, K) = z vᵀ · scale, which multiplied out may need more memory than all activations of the model."""

    z: Tensor  # (N, D), in the dtype of the product
    v: Tensor  # (K, D), in the same dtype
    scale: Tensor  # (K,) float32 or more

    def block(self, columns: slice) -> Tensor:
        """Compute the logits (N, k) of some prototypes, in float32 or float64."""
        return upcast(self.z @ self.v[columns].T) * self.scale[columns]

    def blocks(self) -> Iterator[slice]:
        """Yield slices of the prototypes, in blocks of a size that computes fast and fits in memory."""
        size = _CPU_BLOCK if self.z.device.type == "cpu" else _GPU_BLOCK
        width = max(_MIN_COLUMNS, size // len(self.z))
        return (slice(start, start + width) for start in range(0, len(self.v), width))


class TeacherTargets(NamedTuple):
    """Teacher targets q = softmax((logits - center) / temperature) over K prototypes."""

    logits: FactoredLogits  # (G·B, K), without gradient, one global view after the other
    center: Tensor  # (K,)
    temperature: float  # above 0

    def block(self, columns: slice) -> Tensor:
        """Compute (logits - center) / temperature of some prototypes: (G·B, k) in float32 or float64."""
        return self.logits.block(columns).sub_(self.center[columns]).div_(self.temperature)


def dino_loss(student: FactoredLogits, targets: TeacherTargets, *, views: int, temperature: float) -> Tensor:
    """Compute the mean cross-entropy between the teacher's view i and the student's view v, over all pairs with i ≠ v.

    With the student's logits s = z Wᵀ, the sum over the pairs can be written as

        Σ_v [ n_v · logsumexp(s_v / τ) - ⟨Σ_{i≠v} q_i W, z_v⟩ / τ ],   n_v = the number of i ≠ v,

    where logits occur only inside sums over K. These are computed block by block, in the forward and again in the
    backward pass, so that memory does not grow with K.

    Args:
        student: (V·B, K), one view after the other, the global views first.
        targets: (G·B, K); G ≤ V global views.
        views: V.
        temperature: τ, of the student, above 0.

    Returns:
        Scalar, in float32 or float64. With V views there are G·V - G pairs.
    """
    loss: Tensor = _CrossEntropy.apply(*student, targets, views, temperature)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's, which takes any attribute
        z: Tensor,
        v: Tensor,
        scale: Tensor,
        targets: TeacherTargets,
        views: int,
        temperature: float,
    ) -> Tensor:
        student = FactoredLogits(z, v, scale)
        lse, target_lse = StreamingLogSumExp(len(z), scale), StreamingLogSumExp(len(targets.logits.z), scale)
        expected = scale.new_zeros(len(targets.logits.z), z.shape[1])  # (G·B, D): Σ_k e^(target - maximum) W_k
        with torch.autocast(z.device.type, enabled=False):
            for columns in student.blocks():
                lse.add(student.block(columns).div_(temperature))
                weight, factor = target_lse.add(targets.block(columns))  # (G·B, k), (G·B,)
                expected.mul_(factor[:, None]).add_(weight.mul_(scale[columns]).to(v.dtype) @ v[columns])
        batch = len(z) // views
        globals_ = len(expected) // batch
        expected.div_(target_lse.sum[:, None])
        others = _others(expected.view(globals_, batch, -1), views)  # (V, B, D)
        partners = scale.new_full((views, 1), globals_)  # n_v: the teachers that each view is compared with
        partners[:globals_] -= 1
        pairs = batch * globals_ * (views - 1)
        ctx.save_for_backward(z, v, scale, *targets.logits, targets.center, lse.value, target_lse.value, partners)
        ctx.target_temperature, ctx.temperature, ctx.pairs = targets.temperature, temperature, pairs
        cross = (others * z.view(views, batch, -1)).sum(dim=-1)  # (V, B)
        return (partners * lse.value.view(views, batch) - cross / temperature).sum() / pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        z, v, scale, target_z, target_v, target_scale, center, lse, target_lse, partners = ctx.saved_tensors
        student, temperature = FactoredLogits(z, v, scale), ctx.temperature
        targets = TeacherTargets(FactoredLogits(target_z, target_v, target_scale), center, ctx.target_temperature)
        views = len(partners)
        batch = len(z) // views
        factor = grad / (ctx.pairs * temperature)
        z_grad, v_grad, scale_grad = torch.zeros_like(z, dtype=scale.dtype), torch.empty_like(v), scale.clone()
        for columns in student.blocks():
            cosines = (z @ v[columns].T).to(scale.dtype)  # (V·B, k), not yet scaled
            p = (cosines * (scale[columns] / temperature)).sub_(lse[:, None]).exp_().view(views, batch, -1)
            q = targets.block(columns).sub_(target_lse[:, None]).exp_().view(-1, batch, p.shape[-1])  # (G, B, k)
            slope = p.mul_(partners[..., None]).sub_(_others(q, views)).mul_(factor).flatten(0, 1)  # d loss / d logits
            torch.linalg.vecdot(slope, cosines, dim=0, out=scale_grad[columns])
            slope = slope.mul_(scale[columns]).to(v.dtype)
            z_grad += slope @ v[columns]
            torch.mm(slope.T, z, out=v_grad[columns])
        return z_grad.to(z.dtype), v_grad, scale_grad, None, None, None


class StreamingLogSumExp:
    """Logarithm of a sum of exponentials over blocks (N, k) of columns, without overflow."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.maximum = like.new_full((rows,), -math.inf)  # (N,)
        self.sum = like.new_zeros(rows)  # (N,) of e^(column - maximum)

    def add(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block, in place: return it as e^(block - maximum), and the factor (N,) to rescale earlier blocks by."""
        maximum = torch.maximum(self.maximum, block.amax(dim=1))
        factor = (self.maximum - maximum).exp_()
        block.sub_(maximum[:, None]).exp_()
        self.sum.mul_(factor).add_(block.sum(dim=1))
        self.maximum = maximum
        return block, factor

    @property
    def value(self) -> Tensor:
        """The logarithm (N,) over the blocks so far."""
        return self.maximum + self.sum.log()


def _others(teachers: Tensor, views: int) -> Tensor:
    """Sum the teachers (G, B, ...) of the other views for each of V views: (V, B, ...)."""
    total = teachers.sum(dim=0)
    return torch.cat([total - teachers, total.expand(views - len(teachers), *total.shape)])


class Center(nn.Module):
    """Running mean of the teacher's logits, which prevents a single prototype from dominating.

    center ← momentum · center + (1 - momentum) · mean of the logits (G·B, K) over all processes, once per optimizer
    step: `accumulate` adds the logits of a micro-batch, `update` moves the center. A step uses the center of the steps
    before it.
    """

    value: Tensor
    sum: Tensor
    count: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))  # (K,)
        self.register_buffer("sum", torch.zeros(prototypes), persistent=False)  # (K,), of the logits since `update`
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def accumulate(self, teacher: FactoredLogits) -> None:
        """Add the logits (G·B, K) of a micro-batch; they are linear in z and need not be multiplied out."""
        total = teacher.z.sum(dim=0, dtype=self.sum.dtype)  # (D,)
        with torch.autocast(self.sum.device.type, enabled=False):
            for columns in teacher.blocks():
                self.sum[columns] += (teacher.v[columns].to(total.dtype) @ total) * teacher.scale[columns]
        self.count += len(teacher.z)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Move the center by the logits since the last update, unless the optimizer step was not `applied`, () bool."""
        mean = all_reduce_sum(self.sum) / (self.count * world_size())
        self.value.copy_(torch.where(applied, self.value.lerp(mean, 1 - self.momentum), self.value))
        self.sum.zero_()
        self.count.zero_()


class AssignmentStats(NamedTuple):
    """Statistics of the teacher's assignment of images to prototypes, in nats; scalars."""

    entropy: Tensor  # of the probabilities of an image, mean over images; 0: one prototype, ln K: uniform
    kl_to_uniform: Tensor  # ln K - entropy
    mutual_information: Tensor  # entropy of the mean assignment - entropy; 0: all images are assigned alike, collapse


@torch.no_grad()
def assignment_stats(targets: TeacherTargets) -> AssignmentStats:
    """Compute the entropy of the teacher's probabilities (G·B, K) and their mutual information with the image.

    The mutual information is 0 in both collapses, to the uniform assignment and to a single prototype, and at most
    ln(G·B), as it is estimated on one batch, of all processes together. Entropy and divergence are those of this
    process: their mean over processes is that of the whole batch.
    """
    lse = StreamingLogSumExp(len(targets.logits.z), targets.logits.scale)
    with torch.autocast(targets.center.device.type, enabled=False):
        for columns in targets.logits.blocks():
            lse.add(targets.block(columns))
        mean, entropy = torch.empty_like(targets.logits.scale), lse.value.new_zeros(())
        for columns in targets.logits.blocks():
            p = targets.block(columns).sub_(lse.value[:, None]).exp_()  # (G·B, k)
            mean[columns] = p.mean(dim=0)
            entropy += torch.special.entr(p).sum()
    entropy /= len(targets.logits.z)
    mutual_information = torch.special.entr(all_reduce_mean(mean)).sum() - entropy
    return AssignmentStats(entropy, math.log(len(targets.center)) - entropy, mutual_information)
