"""Extract frozen features: one pass over the images yields everything that the evaluations need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.config.pretrain import Workers
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.loader import EvalLoader
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.backbone import timm_kwargs
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.models.feature_statistics import feature_std
from ssl_vit.runtime.device import autocast_dtype, best_device, prefer_fused_attention
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar

_TOKENS = 2500  # of a forward pass on a CPU: its activations stay in the cache
_ROWS = 4096  # at a time: features that are mapped from a file need not fit into memory
_PIXEL_SIDE = 32  # that larger images are downsampled to, where the pixels are the features
COLLAPSED = 1e-3  # feature std below which only rounding errors distinguish images


@dataclass(frozen=True)
class Features:
    """Features of N readable images; unreadable ones are missing.

    Float32 in memory; from a feature cache, float16 that is read from the disk on access. Select what you need, for
    example a block, before `.float()`, and never write into them.
    """

    cls: Tensor  # (N, blocks, D): [CLS] of the last blocks, each after the final norm, the last block last
    patch_mean: Tensor  # (N, D), of the same dtype: mean patch token of the last block, after the final norm
    labels: Tensor  # (N,) int64
    index: Tensor  # (N,) int64, of the images in the dataset

    def take(self, rows: Tensor | slice) -> Features:
        """Return the features of some of the images, by mask, index or slice."""
        return Features(self.cls[rows], self.patch_mean[rows], self.labels[rows], self.index[rows])


class FeatureBatch(NamedTuple):
    """Features of B images."""

    cls: Tensor  # (B, blocks, D) float32
    patch_mean: Tensor  # (B, D) float32; (B, 0) where there are no patch tokens


class BackboneExtractor:
    """Extract the tokens of a frozen backbone on its device, in bfloat16 where the device is fast at it.

    The model is in evaluation mode; the transform has resized the images, and normalizes them here. The [CLS] tokens of
    the last `blocks` blocks are kept.
    """

    def __init__(self, loaded: LoadedBackbone, transform: EvalTransform, *, blocks: int) -> None:
        model = loaded.backbone
        self.model = model
        self.transform = transform
        self.blocks = blocks
        self.max_blocks = model.num_blocks
        self.title = f"features of {loaded.source}"
        self.channels = model.config.in_chans  # of the images
        self.shape = (model.embed_dim, model.embed_dim)  # width of a block, and of the mean patch token
        self.device = next(model.parameters()).device
        self.dtype = autocast_dtype(self.device)
        # The largest relative change of a feature vector by rounding: bfloat16 moves features of ViTs by 1 to 3 %, and
        # differs as much between devices; otherwise it is ten times the rounding error of float16.
        self.tolerance = 0.05 if self.dtype else 0.005

    def identity(self) -> dict[str, Any]:
        """Return the hash of the weights, the architecture, the dtype of the forward pass, and the transform."""
        config = self.model.config
        return {
            "kind": "model",
            "weights": self.model.state_sha256(),
            "backbone": {"name": config.name, **timm_kwargs(config)},
            "forward": str(self.dtype or torch.float32).removeprefix("torch."),
            "transform": self.transform.describe(),
        }

    def __call__(self, images: Tensor) -> Iterator[FeatureBatch]:
        """Yield features of images (B, C, S, S) uint8: on a GPU of all at once, on a CPU of a few at a time."""
        patches = (images.shape[-1] // self.model.patch_size) ** 2
        chunk = max(1, _TOKENS // patches) if self.device.type == "cpu" else max(1, len(images))
        for part in torch.split(images.to(self.device, non_blocking=True), chunk):
            yield self._forward(part)

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> FeatureBatch:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            tokens = self.model.get_intermediate_tokens(self.transform.normalize(images), self.blocks)
        cls = torch.stack([block.cls for block in tokens], dim=1).float().cpu()  # (B, blocks, D)
        return FeatureBatch(cls, tokens[-1].patches.float().mean(dim=1).cpu())


class RawPixelExtractor:
    """Extract the pixels themselves, cropped as for the model: a baseline that every score must exceed."""

    title = "raw pixels"
    blocks = max_blocks = 1
    tolerance = 0.005

    def __init__(self, transform: EvalTransform, *, channels: int) -> None:
        self.transform = transform
        self.channels = channels
        self.shape = (channels * min(transform.image_size, _PIXEL_SIDE) ** 2, 0)

    def identity(self) -> dict[str, Any]:
        """Return how the images are cropped and downsampled."""
        transform = {key: value for key, value in self.transform.describe().items() if key not in ("mean", "std")}
        return {"kind": "raw pixels", "channels": self.channels, "largest_side": _PIXEL_SIDE, "transform": transform}

    def __call__(self, images: Tensor) -> Iterator[FeatureBatch]:
        """Yield the values in [0, 1] of images (B, C, S, S) uint8."""
        pixels = images.float() / 255
        if pixels.shape[-1] > _PIXEL_SIDE:
            pixels = F.interpolate(pixels, size=(_PIXEL_SIDE, _PIXEL_SIDE), mode="bilinear", antialias=True)
        pixels = pixels.flatten(1).unsqueeze(1)  # (B, 1, D)
        yield FeatureBatch(pixels, pixels.new_empty(len(pixels), 0))


FeatureExtractor = BackboneExtractor | RawPixelExtractor


def extract(
    extractor: FeatureExtractor,
    dataset: ImageDataset,
    *,
    batch_size: int,
    num_workers: Workers,
    skipped: SkippedImageLog,
    show: bool = True,
) -> Features:
    """Extract the features of all readable images into memory, as float32; the others are listed in `skipped`.

    The `batch_size` is that of the loader, and on a GPU of the model; a CPU processes fewer images at a time.

    Raises:
        UserError: No image can be read.
    """
    width, patch_width = extractor.shape
    # Allocated outside of inference mode, so that a classifier can be trained on them.
    cls = torch.empty(len(dataset), extractor.blocks, width)
    patch_mean = torch.empty(len(dataset), patch_width)
    index = torch.empty(len(dataset), dtype=torch.int64)
    done = 0
    for indices, batch in iter_features(
        extractor, dataset, batch_size=batch_size, num_workers=num_workers, skipped=skipped, show=show
    ):
        rows = slice(done, done + len(indices))
        cls[rows], patch_mean[rows], index[rows] = batch.cls, batch.patch_mean, indices
        done += len(indices)
    if not done:
        raise none_readable(skipped)
    return Features(cls[:done], patch_mean[:done], dataset.labels[index[:done]], index[:done])


def iter_features(
    extractor: FeatureExtractor,
    dataset: ImageDataset,
    *,
    batch_size: int,
    num_workers: Workers,
    skipped: SkippedImageLog,
    show: bool = True,
) -> Iterator[tuple[Tensor, FeatureBatch]]:
    """Yield the indices (B,) int64 of readable images, ascending, with their features, some at a time."""
    transform, channels = extractor.transform, extractor.channels
    loader = EvalLoader(
        dataset, transform, batch_size=batch_size, num_workers=num_workers, channels=channels, skipped=skipped
    )
    with progress_bar(total=len(dataset), desc=extractor.title, unit=" images", show=show) as bar:
        for images, indices, unreadable in loader.batches:
            for error in unreadable:
                skipped.record(error)
            done = 0
            for batch in extractor(images) if len(images) else ():
                yield indices[done : done + len(batch.cls)], batch
                done += len(batch.cls)
                bar.update(len(batch.cls))
            bar.update(len(unreadable))


def none_readable(skipped: SkippedImageLog) -> UserError:
    """Return the error for a dataset without readable images."""
    return UserError(f"none of the images can be read; {skipped.path} lists the reasons")


def on_best_device(loaded: LoadedBackbone) -> LoadedBackbone:
    """Move a model to the best device and select the attention kernel that is fast there."""
    device = best_device()
    loaded.backbone.to(device).set_fused_attention(prefer_fused_attention(device))
    return loaded


def validate_features(features: Features, source: str) -> None:
    """Check that features are usable.

    Raises:
        UserError: They are not finite, zero, or the same for every image.
    """
    count, infinite, zero = len(features.cls), 0, 0
    for cls, patch_mean in zip(torch.split(features.cls, _ROWS), torch.split(features.patch_mean, _ROWS), strict=True):
        infinite += int((~(cls.flatten(1).isfinite().all(dim=1) & patch_mean.isfinite().all(dim=1))).sum())
        zero += int((cls[:, -1].float().norm(dim=1) < 1e-6).sum())
    if infinite:
        raise UserError(
            f"{source}: the features of {infinite:,} of {count:,} images are not finite (or exceed 65,504, the largest "
            "float16). Training has diverged: use an earlier checkpoint, or train again with a smaller learning rate"
        )
    if zero:
        raise UserError(
            f"{source}: the features of {zero:,} of {count:,} images are zero. The model is damaged: use another "
            "checkpoint"
        )
    if count > 1 and (std := float(feature_std(subsample(features.cls[:, -1])))) < COLLAPSED:
        raise UserError(
            f"{source}: the features have collapsed: all images have nearly identical features (std {std:.1e}; healthy "
            f"models: 0.1 to 1, below {COLLAPSED:g} only rounding errors distinguish images). Use an earlier "
            "checkpoint, or train again and watch the health warnings of the run"
        )


def mean_cls(features: Features) -> Tensor:
    """Compute the mean [CLS] of all images (blocks, D) float32, in chunks."""
    total = sum(part.float().sum(dim=0).double() for part in torch.split(features.cls, _ROWS))
    return torch.as_tensor(total / len(features.cls)).float()


def center_cls(features: Features, mean: Tensor) -> Features:
    """Subtract the training mean (1, D) from the features: else an image's brightness dominates the cosine."""
    parts = [(part - mean).to(part.dtype) for part in torch.split(features.cls, _ROWS)]
    return replace(features, cls=torch.cat(parts))


def subsample(features: Tensor, most: int = 1 << 15) -> Tensor:
    """Return at most `most` evenly spaced rows of features (N, D) as float32, for statistics."""
    return features[:: -(-len(features) // most)].float()


def check_size(image_size: int, patch_size: int) -> None:
    """Check that images divide into whole patches.

    Raises:
        UserError: They do not; names the nearest size that does.
    """
    if image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise UserError(
            f"data.image_size={image_size} is not a multiple of the model's patch size {patch_size}; "
            f"the nearest multiple is data.image_size={nearest}"
        )
