"""A textbook DINO step: a loss per pair of views, and loops over parameters for clipping, optimizer and teacher."""

from __future__ import annotations

import copy
import itertools

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ssl_vit.config.methods import DINOHeadConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import timm_kwargs


class TextbookDINO(nn.Module):
    """Student, teacher and center as the paper's pseudo-code has them; for checking results, time and memory."""

    def __init__(self, backbone: BackboneConfig, head: DINOHeadConfig, *, fused_attention: bool) -> None:
        super().__init__()
        vit = timm.create_model(backbone.name, **timm_kwargs(backbone))
        for block in vit.blocks:
            block.attn.fused_attn = fused_attention
        dims = [vit.embed_dim, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim]
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(dims)]
        mlp = nn.Sequential(*[layer for linear in linears for layer in (linear, nn.GELU())][:-1])
        last = weight_norm(nn.Linear(head.bottleneck_dim, head.prototypes, bias=False))
        last.parametrizations.weight.original0.data.fill_(1)
        last.parametrizations.weight.original0.requires_grad = not head.norm_last_layer
        self.student = nn.ModuleDict({"backbone": vit, "mlp": mlp, "last": last})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, head.prototypes))

    def logits(self, model: nn.ModuleDict, resolutions: list[Tensor]) -> Tensor:
        """(Σ V·B, K) of images (V·B, C, H, W), one entry per resolution; the head sees all together."""
        cls = torch.empty(0)
        for images in resolutions:
            cls = torch.cat([cls, model["backbone"].forward_features(images)[:, 0]])
        return model["last"](F.normalize(model["mlp"](cls), dim=-1))

    def loss(self, views: list[Tensor], student_temperature: float, teacher_temperature: float) -> Tensor:
        """The mean over pairs; views (B, C, H, W), the two global ones first."""
        teacher = self.logits(self.teacher, [torch.cat(views[:2])])
        resolutions = [torch.cat(views[:2])] + ([torch.cat(views[2:])] if views[2:] else [])
        student = (self.logits(self.student, resolutions).float() / student_temperature).chunk(len(views))
        targets = F.softmax((teacher.float() - self.center) / teacher_temperature, dim=-1).detach().chunk(2)
        total, pairs = torch.zeros(()), 0
        for index, target in enumerate(targets):
            for view, logits in enumerate(student):
                if view != index:
                    total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    pairs += 1
        self.center.mul_(0.9).add_(teacher.float().mean(dim=0, keepdim=True), alpha=0.1)
        return total / pairs

    def finish(self, optimizer: torch.optim.Optimizer, clip: float, momentum: float) -> None:
        """After the backward pass: clip each gradient, step, let the teacher follow."""
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                coefficient = clip / (parameter.grad.norm().item() + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)
        optimizer.step()
        for theirs, ours in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            theirs.mul_(momentum).add_((1 - momentum) * ours.detach())
        optimizer.zero_grad()
