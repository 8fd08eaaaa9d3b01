"""Labels carried from the first frame of a video through the others, by the similarity of frozen patch tokens."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.segmentation.image_outputs import normalize
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError

SIDE = 480  # pixels: of the shorter side in DINO's protocol
STEP = 64  # pixels: DINO's longer sides are multiples of it


class PropagationConfig(NamedTuple):
    """How labels travel; DINO's eval_video_segmentation.py has context 7, radius 12, top_k 5, temperature 0.1."""

    side: int | None  # pixels of the shorter side that the model sees; None: the frames' own, at most 480
    context: int  # frames before the one at hand that labels come from, besides the first
    radius: int | None  # patches in each direction that labels come from; None: the whole frame
    top_k: int  # most similar patches that labels come from, of all frames together
    temperature: float


class Source(NamedTuple):
    """A frame that labels come from."""

    features: Tensor  # (rows, columns, D) float32, each of length 1
    labels: Tensor  # (rows, columns, classes) float32, sums to 1


class LabelPropagator:
    """Carries the labels of one video's first frame through its others, in their order.

    Args:
        model: Its last block's patch tokens after the final norm are compared; it needs no class token.
        rule: How labels travel.
        first: (3, H, W) uint8, the first frame.
        classes: (H, W) int64, the class of each of its pixels, from 0.

    Raises:
        UserError: The rule's side is smaller than half a patch.
    """

    def __init__(self, model: LoadedBackbone, rule: PropagationConfig, first: Tensor, classes: Tensor) -> None:
        self.model = model
        self.rule = rule
        side = rule.side or min(SIDE, *first.shape[-2:])
        self.fitted = fitted_size(first.shape[-2], first.shape[-1], side, model.backbone.patch_size)
        features = patch_features(model, first, self.fitted)
        small = nearest(classes, (features.shape[0], features.shape[1]))
        labels = F.one_hot(small, int(classes.max()) + 1).to(features)
        self.first = Source(features, labels)
        self.recent: deque[Source] = deque(maxlen=rule.context)

    def step(self, frame: Tensor) -> Tensor:
        """The classes (H, W) int64 of the next frame (3, H, W) uint8, which may have another size."""
        features = patch_features(self.model, frame, self.fitted)
        labels = propagate(features, [self.first, *self.recent], self.rule)
        self.recent.append(Source(features, labels))
        return to_classes(labels, self.fitted, (frame.shape[-2], frame.shape[-1]))


def propagate(features: Tensor, sources: list[Source], rule: PropagationConfig) -> Tensor:
    """Labels (rows, columns, classes) of a frame from those of others.

    Each patch takes the mean label of the `top_k` most similar patches among all sources, weighted by
    exp(cosine / temperature); patches as similar as the last of them count as well. Row by row, so that the memory
    is that of one row with its neighborhood: columns x sources x (2 radius + 1) x columns numbers.

    Args:
        features: (rows, columns, D), each of length 1.
        sources: Of the same grid.
        rule: Radius, top_k and temperature are used.
    """
    rows, columns, _ = features.shape
    radius = rule.radius or max(rows, columns)
    place = torch.arange(columns, device=features.device)
    far = (place[:, None] - place).abs() > radius  # (columns, columns)
    all_features = torch.stack([source.features for source in sources])  # (S, rows, columns, D)
    all_labels = torch.stack([source.labels for source in sources])  # (S, rows, columns, classes)
    carried = torch.empty_like(sources[0].labels)
    for row in range(rows):
        near = slice(max(0, row - radius), row + radius + 1)
        candidates, labels = all_features[:, near], all_labels[:, near].flatten(0, 2)
        similar = features[row] @ candidates.flatten(0, 2).T  # (columns, S x near rows x columns)
        similar.view(columns, -1, columns).masked_fill_(far[:, None], -torch.inf)
        best = similar.topk(min(rule.top_k, similar.shape[1]), dim=1).values
        least, most = best[:, -1:], best[:, :1]
        weights = ((similar - most) / rule.temperature).exp_().masked_fill_(similar < least, 0)
        carried[row] = (weights @ labels) / weights.sum(dim=1, keepdim=True)
    return carried


def to_classes(labels: Tensor, fitted: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The class (H, W) int64 of each pixel, from soft labels of patches.

    In DINO's order: bilinear to the size that the model saw, each class stretched to the range 0 to 1, the largest
    taken, then the nearest pixel at the frame's own size.

    Args:
        labels: (rows, columns, classes).
        fitted: Height and width that the model saw.
        size: Height and width of the frame.
    """
    planes = labels.permute(2, 0, 1)[None]  # (1, classes, rows, columns)
    soft = F.interpolate(planes, fitted, mode="bilinear", align_corners=False)[0].flatten(1)
    low, high = soft.amin(1, keepdim=True), soft.amax(1, keepdim=True)
    stretched = torch.where(high > low, (soft - low) / (high - low).clamp_min(1e-12), soft)
    return nearest(stretched.argmax(0).view(fitted).cpu(), size)


@torch.no_grad()
def patch_features(model: LoadedBackbone, frame: Tensor, fitted: tuple[int, int]) -> Tensor:
    """The last block's patch tokens (rows, columns, D) float32 of a frame (3, H, W) uint8, each of length 1."""
    backbone = model.backbone
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    resized = image.resize((fitted[1], fitted[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].to(backbone.device)
    tokens = backbone.tokens(normalize(pixels.float() / 255, model))
    patches = tokens[0, backbone.num_prefix_tokens :].float()
    return F.normalize(patches, dim=-1).view(fitted[0] // backbone.patch_size, fitted[1] // backbone.patch_size, -1)


def fitted_size(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Height and width that the model sees: `side` on the shorter, the aspect kept, as DINO rounds them.

    The shorter side goes to the nearest multiple of the patch, the longer one down to a multiple of 64; where the
    patch does not divide 64, of the patch.

    >>> fitted_size(480, 854, 480, 16)
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


def nearest(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Classes (H, W) at another height and width, each pixel from where its center lies."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, classes.shape, strict=True)
    )
    return classes[rows][:, columns]
