"""Frozen features: one pass over the images yields all that the evaluations need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.config.pretrain import Workers
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.loading.loader import build_eval_loader
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.backbone import timm_kwargs
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.models.feature_statistics import feature_std
from ssl_vit.runtime.device import autocast_dtype, best_device, prefer_fused_attention
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar

_TOKENS = 2500  # of a forward pass on a CPU: its activations stay in the cache
_CHECKED = 1 << 14  # images at a time: what is mapped from a file need not fit into memory
COLLAPSED = 1e-3  # spread below which features only tell rounding errors apart


@dataclass(frozen=True)
class Features:
    """What a model says of N images; images that could not be read are missing.

    Float32 in memory; of a store, float16 that is read from the disk when it is used. Take what you need of them, a
    block say, and then its `.float()`; never write into them.
    """

    cls: Tensor  # (N, blocks, D): [CLS] of the last blocks, each after the final norm, the last block last
    patch_mean: Tensor  # (N, D), of the same type: mean patch token of the last block, after the final norm
    labels: Tensor  # (N,) int64
    index: Tensor  # (N,) int64, places in the dataset

    def take(self, rows: Tensor) -> Features:
        """The features of some of the images."""
        return Features(self.cls[rows], self.patch_mean[rows], self.labels[rows], self.index[rows])


class Described(NamedTuple):
    """What is kept of B images."""

    cls: Tensor  # (B, blocks, D) float32
    patch_mean: Tensor  # (B, D) float32; (B, 0) where there are no patch tokens


class FeatureExtractor(Protocol):
    """Says of whole images what is kept of them: a model, or the pixels themselves."""

    title: str  # for progress bars
    transform: EvalTransform
    channels: int  # that it wants images to have
    blocks: int  # that it describes an image by
    most_blocks: int  # that it could
    shape: tuple[int, int]  # width D of a block, and of the mean patch token

    def identity(self) -> dict[str, Any]:
        """All that decides over what it says but the images and `blocks`, as plain containers."""
        ...

    def tolerance(self) -> float:
        """How far rounding may move what it says of an image, relative to its length."""
        ...

    def __call__(self, images: Tensor) -> Iterator[Described]:
        """What it says of images (B, C, S, S) uint8, in their order, some at a time."""
        ...


class BackboneExtractor:
    """The tokens of a frozen model on its device, in bfloat16 where that is good at it; a `Describer`.

    Args:
        loaded: The model, in evaluation mode.
        transform: Has made the images one size, and normalizes them.
        blocks: How many last blocks to keep the [CLS] token of.
    """

    def __init__(self, loaded: LoadedBackbone, transform: EvalTransform, *, blocks: int) -> None:
        model = loaded.backbone
        self.model = model
        self.transform = transform
        self.blocks = blocks
        self.title = f"features of {loaded.source}"
        self.channels = model.config.in_chans
        self.most_blocks = model.num_blocks
        self.shape = (model.embed_dim, model.embed_dim)
        self.device = next(model.parameters()).device
        self.dtype = autocast_dtype(self.device)

    def identity(self) -> dict[str, Any]:
        """The weights as they are in memory, the architecture, what it computes in, and the transform."""
        config = self.model.config
        return {
            "kind": "model",
            "weights": self.model.state_sha256(),
            "backbone": {"name": config.name, **timm_kwargs(config)},
            "forward": str(self.dtype or torch.float32).removeprefix("torch."),
            "transform": self.transform.describe(),
        }

    def tolerance(self) -> float:
        """Bfloat16 moves features of small and large ViTs by 1 to 3 % of their length, between devices by as much."""
        return 0.05 if self.dtype else 0.005

    def __call__(self, images: Tensor) -> Iterator[Described]:
        """Tokens of images (B, C, S, S) uint8: on a GPU of all at once, on a CPU of a few at a time."""
        patches = (images.shape[-1] // self.model.patch_size) ** 2
        at_once = max(1, _TOKENS // patches) if self.device.type == "cpu" else max(1, len(images))
        for part in torch.split(images.to(self.device, non_blocking=True), at_once):
            yield self._pass(part)

    @torch.inference_mode()
    def _pass(self, images: Tensor) -> Described:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            tokens = self.model.get_intermediate_tokens(self.transform.normalize(images), self.blocks)
        cls = torch.stack([block.cls for block in tokens], dim=1).float().cpu()  # (B, blocks, D)
        return Described(cls, tokens[-1].patches.float().mean(dim=1).cpu())


def extract(
    loaded: LoadedBackbone,
    dataset: ImageDataset,
    transform: EvalTransform,
    *,
    blocks: int,
    batch_size: int,
    num_workers: Workers,
    skipped: SkippedImageLog,
    show: bool = True,
) -> Features:
    """A model's features of all readable images, in memory.

    Args:
        loaded: The model, in evaluation mode.
        dataset: What to describe.
        transform: Makes the images one size and normalizes them.
        blocks: How many last blocks to keep the [CLS] token of.
        batch_size: Images loaded together, and on a GPU described together; a CPU takes fewer at a time.
        num_workers: Loading processes.
        skipped: Takes the images that cannot be read.
        show: Draw a progress bar on a terminal.

    Raises:
        UserError: No image can be read.
    """
    describe = BackboneExtractor(loaded, transform, blocks=blocks)
    return extract_features(
        describe, dataset, batch_size=batch_size, num_workers=num_workers, skipped=skipped, show=show
    )


def extract_features(
    describe: FeatureExtractor,
    dataset: ImageDataset,
    *,
    batch_size: int,
    num_workers: Workers,
    skipped: SkippedImageLog,
    show: bool = True,
) -> Features:
    """What is said of all readable images, as float32.

    Raises:
        UserError: No image can be read.
    """
    width, patch_width = describe.shape
    # Made outside of inference mode, so that a probe may be trained on them.
    cls = torch.empty(len(dataset), describe.blocks, width)
    patch_mean = torch.empty(len(dataset), patch_width)
    index = torch.empty(len(dataset), dtype=torch.int64)
    done = 0
    for places, said in iter_features(
        describe, dataset, batch_size=batch_size, num_workers=num_workers, skipped=skipped, show=show
    ):
        rows = slice(done, done + len(places))
        cls[rows], patch_mean[rows], index[rows] = said.cls, said.patch_mean, places
        done += len(places)
    if not done:
        raise none_readable(skipped)
    return Features(cls[:done], patch_mean[:done], dataset.labels[index[:done]], index[:done])


def iter_features(
    describe: FeatureExtractor,
    dataset: ImageDataset,
    *,
    batch_size: int,
    num_workers: Workers,
    skipped: SkippedImageLog,
    show: bool = True,
) -> Iterator[tuple[Tensor, Described]]:
    """The places (B,) int64 of readable images, ascending, and what is said of them, some at a time."""
    loader = build_eval_loader(
        dataset,
        describe.transform,
        batch_size=batch_size,
        num_workers=num_workers,
        channels=describe.channels,
        skipped=skipped,
    )
    with _bar(describe.title, len(dataset), show=show) as bar:
        for images, places, broken in loader.batches:
            for image in broken:
                skipped.record(image)
            done = 0
            for said in describe(images) if len(images) else ():
                yield places[done : done + len(said.cls)], said
                done += len(said.cls)
                bar.update(len(said.cls))
            bar.update(len(broken))


def none_readable(skipped: SkippedImageLog) -> UserError:
    """The error of images that are all broken."""
    return UserError(f"none of the images can be read; {skipped.path} says why")


def on_best_device(loaded: LoadedBackbone) -> LoadedBackbone:
    """The model moved there, with the form of attention that is fast on it."""
    device = best_device()
    loaded.backbone.to(device).set_fused_attention(prefer_fused_attention(device))
    return loaded


def validate_features(features: Features, source: str) -> None:
    """Refuse features that no evaluation can say anything of.

    Raises:
        UserError: They are not finite, zero, or the same for every image.
    """
    count, broken, zero = len(features.cls), 0, 0
    for cls, patch_mean in zip(
        torch.split(features.cls, _CHECKED), torch.split(features.patch_mean, _CHECKED), strict=True
    ):
        broken += int((~(cls.flatten(1).isfinite().all(dim=1) & patch_mean.isfinite().all(dim=1))).sum())
        zero += int((cls[:, -1].float().norm(dim=1) < 1e-6).sum())
    if broken:
        raise UserError(
            f"{source}: the features of {broken:,} of {count:,} images are not finite numbers (or are beyond 65,504, "
            "the largest that float16 holds); training has diverged: take an earlier checkpoint, or train again with "
            "a smaller learning rate"
        )
    if zero:
        raise UserError(
            f"{source}: the features of {zero:,} of {count:,} images are zero; "
            "the model is damaged: take another checkpoint"
        )
    if count > 1 and (found := float(feature_std(subsample(features.cls[:, -1])))) < COLLAPSED:
        raise UserError(
            f"{source}: the features have collapsed: every image gets nearly the same ones (spread {found:.1e}; "
            f"healthy models lie between 0.1 and 1, below {COLLAPSED:g} only rounding errors tell images apart); "
            "take an earlier checkpoint, or train again and watch the health lines of the run"
        )


def subsample(features: Tensor, most: int = 1 << 15) -> Tensor:
    """At most so many of features (N, D), spread over the set, as float32: enough for a measure of all."""
    return features[:: -(-len(features) // most)].float()


def check_size(image_size: int, patch_size: int) -> None:
    """Refuse images that do not divide into whole patches.

    Raises:
        UserError: They do not; with the nearest size that would do.
    """
    if image_size % patch_size:
        near = max(1, round(image_size / patch_size)) * patch_size
        raise UserError(
            f"data.image_size={image_size} is not a multiple of the model's patch size {patch_size}; "
            f"the nearest is data.image_size={near}"
        )


def _bar(text: str, total: int, *, show: bool) -> tqdm[NoReturn]:
    """Return a progress bar over images."""
    return progress_bar(total=total, desc=text, unit=" images", show=show)
