"""Backbone: a timm vision transformer with named tokens."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.activation_checkpointing import enable_activation_checkpointing
from ssl_vit.models.attention import set_attention_impl
from ssl_vit.models.drop_path import replace_drop_path, sample_drop_paths
from ssl_vit.models.official_positions import use_official_positions
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.text import pluralize

_MAX_GRAPHS = 64  # of all blocks of a process: a model in training has five, and a process may build several

_UNSUPPORTED = "not a plain ViT: hybrids, parallel blocks and rotary position embeddings are not supported"


class Tokens(NamedTuple):
    """Backbone output for B images, after the final norm."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, N, D), row by row over the grid
    grid: tuple[int, int]  # rows and columns of patches, N = rows x columns


class Backbone(nn.Module):
    """Plain timm ViT, for images of any size that is a multiple of the patch size.

    Initialization and interpolation of the position embeddings are timm's. DINO's differ slightly: its class token is
    initialized with std .02 instead of 1e-6, and it interpolates on another grid without antialiasing, as here after
    `use_official_positions`.

    Raises:
        UserError: timm does not know the name, or it is not a plain ViT, or it has batch norm.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = _create(config)
        self.drop_paths = replace_drop_path(self.vit)
        self.compiled = False
        self.positions = "timm"  # whose interpolation, timm or official
        # Attributes, not properties: nn.Module hides an AttributeError inside a property.
        self.embed_dim = int(self.vit.embed_dim)  # D
        self.patch_size = config.patch_size  # pixels
        self.num_blocks = len(self.vit.blocks)
        self.num_heads = int(next(part.num_heads for part in self.vit.blocks.modules() if hasattr(part, "num_heads")))
        self.num_registers = int(self.vit.num_reg_tokens)
        self.num_prefix_tokens = int(self.vit.num_prefix_tokens)  # class token, then registers, before the patches
        self.has_cls = bool(self.vit.has_class_token and self.vit.global_pool == "token")  # one that is pooled

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def describe(self) -> str:
        """Return the sizes of what was built, in words."""
        config = self.config
        registers = f"{pluralize(self.num_registers, 'register')}, " if self.num_registers else ""
        return (
            f"width {self.embed_dim}, {self.num_blocks} blocks, {self.num_heads} heads, {registers}"
            f"images of {config.img_size} pixels in patches of {config.patch_size}"
        )

    def require_cls(self) -> Self:
        """Return this backbone if it pools a class token.

        Raises:
            UserError: It does not.
        """
        if not self.has_cls:
            raise UserError(f"{self.config.name} has no class token that it pools; choose a ViT that pools one")
        return self

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tokens:
        """Compute the tokens of (B, C, H, W) float; sample keys (B,) int64 are for drop path in training."""
        if self.training and self.drop_paths:
            sample_drop_paths(self.drop_paths, key, images.device)
        return self._split(self.tokens(images), images)

    def tokens(self, images: Tensor) -> Tensor:
        """Return all tokens (B, prefix + N, D) of the last block, after the final norm; without drop path."""
        tokens: Tensor = self.vit.forward_features(images)
        return tokens

    def get_intermediate_tokens(self, images: Tensor, count: int) -> list[Tokens]:
        """Return the tokens of the last `count` blocks, each after the final norm, in order; without drop path."""
        features = self.vit.forward_intermediates(
            images, indices=count, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return [self._split(torch.cat([prefix, patches], dim=1), images) for patches, prefix in features]

    def get_patches_of_blocks(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the final tokens (B, prefix + N, D), and each block's patches (B, N, D) before the final norm."""
        tokens, patches = self.vit.forward_intermediates(images, output_fmt="NLC")
        return tokens, patches

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches of images (..., H, W)."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _split(self, tokens: Tensor, images: Tensor) -> Tokens:
        prefix = self.num_prefix_tokens  # [CLS], then the registers
        return Tokens(tokens[:, 0], tokens[:, 1:prefix], tokens[:, prefix:], self.grid(images))

    def set_fused_attention(self, fused: bool) -> None:
        """Choose between torch's fused attention and plain matrix products, which give the same result."""
        for block in self.vit.blocks:
            set_attention_impl(block.attn, fused=fused)

    def plain_attention(self, block: int) -> Attention:
        """Return the attention module of a block.

        Raises:
            UserError: The block does not compute one plain softmax(q k) attention.
        """
        modules = [module for module in self.vit.blocks[block].modules() if type(module) is Attention]
        if len(modules) != 1:
            raise UserError(f"{self.config.name}: attention maps need blocks with one plain softmax attention each")
        return modules[0]

    def compile_blocks(self) -> None:
        """Compile each block, once per input shape; the weights keep their names.

        For training. Where shapes vary, as in evaluation, `torch.compiler.set_stance("force_eager")` disables it.
        """
        torch._dynamo.config.recompile_limit = _MAX_GRAPHS
        for block in self.vit.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        self.compiled = True

    def enable_activation_checkpointing(self) -> None:
        """Keep fewer activations for the backward pass, which then takes a little longer."""
        enable_activation_checkpointing(self.vit.blocks, whole_blocks=self.compiled)

    def shard_blocks(self, mesh: DeviceMesh) -> None:
        """Shard the weights of each block over processes (FSDP2)."""
        for block in self.vit.blocks:
            fully_shard(block, mesh=mesh)

    def resize(self, img_size: int) -> None:
        """Resample the position embeddings to another image size, once and for good."""
        if img_size != self.config.img_size:
            self.vit.set_input_size(img_size=(img_size, img_size))
            self.config = self.config.model_copy(update={"img_size": img_size})

    def use_official_positions(self) -> None:
        """Interpolate the position embeddings as DINO's code does instead of timm's.

        Raises:
            UserError: The tokens are not those of DINO's models.
        """
        use_official_positions(self.vit, self.config.name)
        self.positions = "official"

    def init_prefix_tokens(self, std: float) -> None:
        """Draw the class token and the registers again, from a truncated normal distribution."""
        for token in (self.vit.cls_token, self.vit.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=std)

    def patch_filters(self) -> Tensor:
        """Return the weight (D, C, p, p) of the patch embedding."""
        weight: Tensor = self.vit.patch_embed.proj.weight.detach()
        return weight

    def position_embeddings(self) -> Tensor | None:
        """Return the learned position embeddings (rows, columns, D) of the patches, or None if there are none."""
        if self.vit.pos_embed is None:
            return None
        rows, columns = self.vit.patch_embed.grid_size
        embeddings: Tensor = self.vit.pos_embed[0, -rows * columns :].detach().view(rows, columns, -1)
        return embeddings

    def layer_patterns(self, prefix: str) -> dict[str, str]:
        """Return timm's `group_matcher`: regular expressions of the parameters of the stem and of each block."""
        inside = rf"^{re.escape(prefix)}vit\."
        return {
            "stem": inside + r"(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)",
            "blocks": inside + r"blocks\.(\d+)",
        }

    def state_sha256(self) -> str:
        """Hash the weights in memory under timm's names, wherever they came from."""
        return state_sha256(self.vit.state_dict())

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode as `nn.Module.train`, but keep a frozen backbone in evaluation mode."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash the names, types, shapes and values of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def timm_kwargs(config: BackboneConfig) -> dict[str, Any]:
    """Return the keywords of `timm.create_model` for the architecture, without those that matter only in training."""
    sizes = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads}
    return {
        "num_classes": 0,
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "reg_tokens": config.reg_tokens,
        "dynamic_img_size": True,
        **{name: value for name, value in sizes.items() if value is not None},
    }


def _create(config: BackboneConfig) -> VisionTransformer:
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name.split('.')[0]}*")[:5] or timm.list_models("vit_*_patch16_224")[:5]
        raise UserError(f"backbone.name={config.name}: timm has no such model; there are {', '.join(near)}")
    weight_init = {"timm": "", "jax": "jax"}[config.init]
    arguments = {**timm_kwargs(config), "drop_path_rate": config.drop_path, "weight_init": weight_init}
    try:
        with _quiet_timm():
            vit = timm.create_model(config.name, pretrained=False, **arguments)
    except TypeError:  # of a class without these arguments
        vit = None
    check_plain_vit(vit, f"backbone.name={config.name}")
    if any(isinstance(module, _BatchNorm) for module in vit.modules()):
        raise UserError(
            f"backbone.name={config.name} has batch norm, whose result depends on how a batch is spread over processes "
            "and micro-batches: choose one with layer norm"
        )
    return vit


def check_plain_vit(vit: nn.Module | None, origin: str) -> None:
    """Check that a model of timm is a ViT of blocks with one attention, then one MLP, on plain patches.

    Raises:
        UserError: It is not; the message begins with `origin`.
    """
    if not (
        isinstance(vit, VisionTransformer)
        and type(vit) is VisionTransformer
        and type(vit.patch_embed) is PatchEmbed
        and all(hasattr(block, "attn") and hasattr(block, "drop_path1") for block in vit.blocks)
    ):
        raise UserError(f"{origin} is {_UNSUPPORTED}")


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """Suppress timm's warnings about settings that differ from those of the model's name, as they do on purpose."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
