"""The DINO loss (Caron et al. 2021, arXiv 2104.14294, algorithm 1 and `main_dino.DINOLoss`)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_vit.losses.factored_logits import FactoredLogits
from ssl_vit.runtime.distributed import all_reduce_mean, all_reduce_sum, world_size


class TeacherTargets(NamedTuple):
    """What the teacher says: the probabilities q = softmax((logits - center) / temperature) over K prototypes."""

    logits: FactoredLogits  # (G·B, K), without gradient, one global view after the other
    center: Tensor  # (K,)
    temperature: float  # above 0

    def columns(self, part: slice) -> Tensor:
        """(logits - center) / temperature for some prototypes: (G·B, k) in float32 or more."""
        return self.logits.columns(part).sub_(self.center[part]).div_(self.temperature)


def dino_loss(student: FactoredLogits, targets: TeacherTargets, *, views: int, temperature: float) -> Tensor:
    """Mean cross-entropy between the teacher's view i and the student's view v, over all pairs with i ≠ v.

    With the student's logits s = z Wᵀ, the pairs' sum over teachers i comes apart into

        Σ_v [ n_v · logsumexp(s_v / τ) - ⟨Σ_{i≠v} q_i W, z_v⟩ / τ ],   n_v = the number of i ≠ v,

    so that logits are needed only inside of sums over K. Those are taken block by block, forward and again backward:
    memory does not grow with K.

    Args:
        student: (V·B, K), one view after the other, the global views first.
        targets: (G·B, K); G ≤ V global views.
        views: V.
        temperature: τ, of the student, above 0.

    Returns:
        Scalar, in float32 or more. With V views there are G·V - G pairs.
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
        expected = scale.new_zeros(len(targets.logits.z), z.shape[1])  # (G·B, D): Σ_k e^(target - top) W_k
        with torch.autocast(z.device.type, enabled=False):
            for part in student.blocks():
                lse.add(student.columns(part).div_(temperature))
                weight, shrunk = target_lse.add(targets.columns(part))  # (G·B, k), (G·B,)
                expected.mul_(shrunk[:, None]).add_(weight.mul_(scale[part]).to(v.dtype) @ v[part])
        batch = len(z) // views
        globals_ = len(expected) // batch
        expected.div_(target_lse.sum[:, None])
        others = _others(expected.view(globals_, batch, -1), views)  # (V, B, D)
        partners = _partners(globals_, views, scale)  # (V, 1)
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
        for part in student.blocks():
            cosines = (z @ v[part].T).to(scale.dtype)  # (V·B, k), not yet scaled
            p = (cosines * (scale[part] / temperature)).sub_(lse[:, None]).exp_().view(views, batch, -1)
            q = targets.columns(part).sub_(target_lse[:, None]).exp_().view(-1, batch, p.shape[-1])  # (G, B, k)
            slope = p.mul_(partners[..., None]).sub_(_others(q, views)).mul_(factor).flatten(0, 1)  # d loss / d logits
            torch.linalg.vecdot(slope, cosines, dim=0, out=scale_grad[part])
            slope = slope.mul_(scale[part]).to(v.dtype)
            z_grad += slope @ v[part]
            torch.mm(slope.T, z, out=v_grad[part])
        return z_grad.to(z.dtype), v_grad, scale_grad, None, None, None


class StreamingLogSumExp:
    """The logarithm of a sum of exponentials over columns (N, k) that come block by block; nothing overflows."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.top = like.new_full((rows,), -math.inf)  # (N,)
        self.sum = like.new_zeros(rows)  # (N,) of e^(column - top)

    def add(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Take a block in: it becomes e^(columns - top). Also returns by what (N,) all before it have shrunk."""
        top = torch.maximum(self.top, columns.amax(dim=1))
        shrunk = (self.top - top).exp_()
        columns.sub_(top[:, None]).exp_()
        self.sum.mul_(shrunk).add_(columns.sum(dim=1))
        self.top = top
        return columns, shrunk

    @property
    def value(self) -> Tensor:
        """(N,)."""
        return self.top + self.sum.log()


def _others(teachers: Tensor, views: int) -> Tensor:
    """For each of V views the sum (V, B, ...) over the teachers (G, B, ...) that saw another view."""
    total = teachers.sum(dim=0)
    return torch.cat([total - teachers, total.expand(views - len(teachers), *total.shape)])


def _partners(globals_: int, views: int, like: Tensor) -> Tensor:
    """How many teachers each view is compared with (V, 1)."""
    view = torch.arange(views, device=like.device)[:, None]
    return (globals_ - (view < globals_).to(like.dtype)).to(like.dtype)


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
    def observe(self, teacher: FactoredLogits) -> None:
        """Add the logits (G·B, K) of a micro-batch; linear in z, they need not be multiplied out."""
        total = teacher.z.sum(dim=0, dtype=self.seen.dtype)  # (D,)
        with torch.autocast(self.seen.device.type, enabled=False):
            for part in teacher.blocks():
                self.seen[part] += (teacher.v[part].to(total.dtype) @ total) * teacher.scale[part]
        self.count += len(teacher.z)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Move the center by what was observed since the last update, and forget that.

        Where the optimizer step was not `applied`, () bool, it is only forgotten.
        """
        mean = all_reduce_sum(self.seen) / (self.count * world_size())
        self.value.copy_(torch.where(applied, self.value.lerp(mean, 1 - self.momentum), self.value))
        self.seen.zero_()
        self.count.zero_()


class AssignmentStats(NamedTuple):
    """How the teacher spreads images over prototypes, in nats; each a scalar."""

    entropy: Tensor  # of one image's probabilities, mean; 0 = one prototype, ln K = uniform
    kl_to_uniform: Tensor  # ln K - entropy
    information: Tensor  # entropy of the mean assignment - entropy; 0 = the same answer for every image: collapse


@torch.no_grad()
def assignment_stats(targets: TeacherTargets) -> AssignmentStats:
    """Entropy of the teacher's probabilities (G·B, K) and the information that they carry about the image.

    In both collapses, to the uniform answer and to a single prototype, the information goes to 0. It is at most
    ln(G·B), because it is estimated on one batch, that of all processes together. Entropy and divergence are this
    process's own: their mean over processes is that of the whole batch.
    """
    lse = StreamingLogSumExp(len(targets.logits.z), targets.logits.scale)
    with torch.autocast(targets.center.device.type, enabled=False):
        for part in targets.logits.blocks():
            lse.add(targets.columns(part))
        mean, entropy = torch.empty_like(targets.logits.scale), lse.value.new_zeros(())
        for part in targets.logits.blocks():
            p = targets.columns(part).sub_(lse.value[:, None]).exp_()  # (G·B, k)
            mean[part] = p.mean(dim=0)
            entropy += torch.special.entr(p).sum()
    entropy /= len(targets.logits.z)
    information = torch.special.entr(all_reduce_mean(mean)).sum() - entropy
    return AssignmentStats(entropy, math.log(len(targets.center)) - entropy, information)
