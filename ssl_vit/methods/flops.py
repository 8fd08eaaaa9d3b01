"""The floating-point operations that training on an image takes, from a stated formula."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ssl_vit.config.methods import CropsConfig, DINOConfig, MethodConfig, SiTConfig
from ssl_vit.models.backbone import Backbone

TRAINED = 3  # a trained model's forward pass, and the gradients of its activations and of its weights


class Flops(NamedTuple):
    """FLOP per image of one training step."""

    teacher: int  # forward, its head included
    student: int  # forward and backward, without the heads
    head: int  # the student's, forward and backward

    @property
    def total(self) -> int:
        """All of them."""
        return self.teacher + self.student + self.head


def flops_per_image(config: MethodConfig, backbone: Backbone) -> Flops:
    """What the step of a method computes for an image, at 2 FLOP per multiply-add.

    Counted are matrix products: patch embedding, blocks, attention and heads. A trained model counts three times its
    forward pass (but the patch embedding twice: images need no gradient), the teacher once. What is computed per
    element (norms, softmax, losses, optimizer), the augmentation, and what an implementation chooses to compute twice
    are not counted.

    Args:
        config: Of the method: its views and heads.
        backbone: As the method has it, with its own register tokens.
    """
    large, small = config.views.global_crops, config.views.local_crops
    student = sum(
        crops.count * (TRAINED * forward_flops(backbone, crops) - _embedding(backbone, crops))
        for crops in (large, small)
    )
    if isinstance(config, SiTConfig):
        return Flops(0, student, TRAINED * large.count * _sit_heads(config, backbone, large))
    assert isinstance(config, DINOConfig)
    head = _dino_head(config, backbone.embed_dim)
    return Flops(
        teacher=large.count * (forward_flops(backbone, large) + head),
        student=student,
        head=TRAINED * (large.count + small.count) * head,
    )


def forward_flops(backbone: Backbone, crops: CropsConfig) -> int:
    """One crop through the backbone, without its heads.

    With N patches of P pixels of C channels, T tokens, and L blocks of width D and inner width H it is
    2·N·D·C·P² + L·(2·T·(4·D² + 2·D·H) + 4·T²·D).
    """
    vit, width = backbone.vit, backbone.embed_dim
    tokens = _patches(backbone, crops) + vit.num_prefix_tokens
    inner = vit.blocks[0].mlp.fc1.out_features
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return int(_embedding(backbone, crops) + len(vit.blocks) * block)


def _embedding(backbone: Backbone, crops: CropsConfig) -> int:
    return 2 * _patches(backbone, crops) * backbone.embed_dim * backbone.config.in_chans * backbone.patch_size**2


def _patches(backbone: Backbone, crops: CropsConfig) -> int:
    return (crops.size // backbone.patch_size) ** 2


def _dino_head(config: DINOConfig, width: int) -> int:
    head = config.head
    hidden = [head.hidden_dim] * (head.layers - 1)
    return _mlp([width, *hidden, head.bottleneck_dim, head.prototypes])


def _sit_heads(config: SiTConfig, backbone: Backbone, crops: CropsConfig) -> int:
    width, total = backbone.embed_dim, 0
    if config.rotation.enabled:
        total += _mlp([width, 4])
    if config.contrastive.enabled:
        hidden = [config.contrastive.hidden_dim] if config.contrastive.head == "mlp" else []
        total += _mlp([width, *hidden, config.contrastive.dim])
    if config.reconstruction.enabled:
        pixels = backbone.config.in_chans * backbone.patch_size**2
        total += _patches(backbone, crops) * _mlp([width, pixels])
    return total


def _mlp(dims: list[int]) -> int:
    return sum(2 * inner * outer for inner, outer in itertools.pairwise(dims))
