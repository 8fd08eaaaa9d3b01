"""Propagate labels from the first frame of a video to the others by the similarity of frozen patch tokens."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.segmentation.image_outputs import normalize
from ssl_vit.models.attention_maps import check_tokens, upsample_mask
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError

SIDE = 480  # pixels: of the shorter side in DINO's protocol
STEP = 64  # pixels: DINO's longer sides are multiples of it


class PropagationConfig(NamedTuple):
    """Settings; DINO's eval_video_segmentation.py has context 7, radius 12, top_k 5, temperature 0.1."""

    side: int | None  # pixels of the shorter side of the model's input; None: the frames' own, at most 480
    context: int  # previous frames that labels come from, besides the first
    radius: int | None  # patches in each direction that labels come from; None: the whole frame
    top_k: int  # most similar patches that labels come from, of all frames together
    temperature: float


class Source(NamedTuple):
    """Features and labels of a frame that others take labels from."""

    features: Tensor  # (rows, columns, D) float32, each of length 1
    labels: Tensor  # (rows, columns, classes) float32, sums to 1


class LabelPropagator:
    """Propagation of the labels of a video's first frame (3, H, W) uint8 to the others, in their order.

    The patch tokens of the model's last block after the final norm are compared; it needs no class token. Labels are
    the classes (H, W) int64 of the pixels, counted from 0.

    Raises:
        UserError: `config.side` is smaller than half a patch.
    """

    def __init__(self, model: LoadedBackbone, config: PropagationConfig, first: Tensor, classes: Tensor) -> None:
        self.model = model
        self.config = config
        side = config.side or min(SIDE, *first.shape[-2:])
        self.input_size = input_size(first.shape[-2], first.shape[-1], side, model.backbone.patch_size)
        features = patch_features(model, first, self.input_size)
        small = upsample_mask(classes, (features.shape[0], features.shape[1]))
        labels = F.one_hot(small, int(classes.max()) + 1).to(features)
        self.first = Source(features, labels)
        self.recent: deque[Source] = deque(maxlen=config.context)

    def step(self, frame: Tensor) -> Tensor:
        """Return the classes (H, W) int64 of the next frame (3, H, W) uint8, which may have another size."""
        features = patch_features(self.model, frame, self.input_size)
        labels = propagate(features, [self.first, *self.recent], self.config)
        self.recent.append(Source(features, labels))
        return to_classes(labels, self.input_size, (frame.shape[-2], frame.shape[-1]))


def propagate(features: Tensor, sources: list[Source], config: PropagationConfig) -> Tensor:
    """Compute the labels (rows, columns, classes) of a frame from those of others.

    Each patch takes the mean label of the `top_k` most similar patches among all sources, weighted by
    exp(cosine / temperature); patches as similar as the last of them are included. It is computed row by row, so that
    the memory is that of one row with its neighborhood: columns x sources x (2 radius + 1) x columns numbers. The
    features (rows, columns, D) have length 1, the sources the same grid.
    """
    rows, columns, _ = features.shape
    radius = config.radius or max(rows, columns)
    column = torch.arange(columns, device=features.device)
    far = (column[:, None] - column).abs() > radius  # (columns, columns)
    all_features = torch.stack([source.features for source in sources])  # (S, rows, columns, D)
    all_labels = torch.stack([source.labels for source in sources])  # (S, rows, columns, classes)
    propagated = torch.empty_like(sources[0].labels)
    for row in range(rows):
        near = slice(max(0, row - radius), row + radius + 1)
        candidates, labels = all_features[:, near], all_labels[:, near].flatten(0, 2)
        similar = features[row] @ candidates.flatten(0, 2).T  # (columns, S x near rows x columns)
        similar.view(columns, -1, columns).masked_fill_(far[:, None], -torch.inf)
        best = similar.topk(min(config.top_k, similar.shape[1]), dim=1).values
        least, most = best[:, -1:], best[:, :1]
        weights = ((similar - most) / config.temperature).exp_().masked_fill_(similar < least, 0)
        propagated[row] = (weights @ labels) / weights.sum(dim=1, keepdim=True)
    return propagated


def to_classes(labels: Tensor, model_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Compute the class (H, W) int64 of each pixel from soft labels (rows, columns, classes) of patches.

    In DINO's order: bilinear to the model's input size, each class scaled to [0, 1], the largest, then the nearest
    pixel at the frame's own size.
    """
    planes = labels.permute(2, 0, 1)[None]  # (1, classes, rows, columns)
    soft = F.interpolate(planes, model_size, mode="bilinear", align_corners=False)[0].flatten(1)
    low, high = soft.amin(1, keepdim=True), soft.amax(1, keepdim=True)
    scaled = torch.where(high > low, (soft - low) / (high - low).clamp_min(1e-12), soft)
    return upsample_mask(scaled.argmax(0).view(model_size).cpu(), size)


@torch.no_grad()
def patch_features(model: LoadedBackbone, frame: Tensor, model_size: tuple[int, int]) -> Tensor:
    """Compute the patch tokens (rows, columns, D) float32 of a frame (3, H, W) uint8, each of length 1."""
    backbone = model.backbone
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    resized = image.resize((model_size[1], model_size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].to(backbone.device)
    tokens = backbone.tokens(normalize(pixels.float() / 255, model))
    check_tokens(backbone, tokens)
    patches = tokens[0, backbone.num_prefix_tokens :].float()
    return F.normalize(patches, dim=-1).view(*(side // backbone.patch_size for side in model_size), -1)


def input_size(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Compute the height and width of the model's input: `side` on the shorter, the aspect kept, rounded as in DINO.

    The shorter side becomes the nearest multiple of the patch, the longer one is rounded down to a multiple of 64, or
    of the patch where that does not divide 64.

    Example:
        >>> input_size(480, 854, 480, 16)
        (480, 832)

    Raises:
        UserError: No patch fits into the shorter side.
    """
    short = round(side / patch) * patch
    if short < patch:
        raise UserError(f"side={side}: smaller than a patch of {patch} pixels")
    step = STEP if STEP % patch == 0 else patch
    longer = side * max(height, width) / min(height, width)
    long = max(int(longer // step) * step, short)
    return (short, long) if height <= width else (long, short)
