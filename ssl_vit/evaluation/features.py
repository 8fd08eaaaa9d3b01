"""Frozen features: one pass over the pictures yields all that the evaluations need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.config import Workers
from ssl_vit.data.loading import eval_loader
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.losses.diversity import spread
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.training.hardware import autocast_dtype, best_device, fused_attention_pays
from ssl_vit.transforms.evaluation import EvalTransform

_TOKENS = 2500  # of a forward pass on a CPU: its activations stay in the cache
COLLAPSED = 1e-3  # spread below which features only tell rounding errors apart


@dataclass(frozen=True)
class Features:
    """What a network says of N pictures; pictures that could not be read are missing."""

    cls: Tensor  # (N, blocks, D) float32: [CLS] of the last blocks, each after the final norm, the last block last
    patch_mean: Tensor  # (N, D) float32: mean patch token of the last block, after the final norm
    labels: Tensor  # (N,) int64
    index: Tensor  # (N,) int64, places in the set of pictures

    def take(self, rows: Tensor) -> Features:
        """The features of some of the pictures."""
        return Features(self.cls[rows], self.patch_mean[rows], self.labels[rows], self.index[rows])


def extract(
    loaded: LoadedBackbone,
    pictures: Pictures,
    transform: EvalTransform,
    *,
    blocks: int,
    batch_size: int,
    workers: Workers,
    skipped: SkippedPictures,
    show: bool = True,
) -> Features:
    """Features of all readable pictures, on the network's device, in bfloat16 where that is good at it.

    Args:
        loaded: The network, in evaluation mode.
        pictures: What to describe.
        transform: Makes the pictures one size and normalises them.
        blocks: How many last blocks to keep the [CLS] token of.
        batch_size: Pictures loaded together, and on a GPU described together; a CPU takes fewer at a time.
        workers: Loading processes.
        skipped: Takes the pictures that cannot be read.
        show: Draw a progress bar on a terminal.

    Raises:
        UserError: No picture can be read.
    """
    network = loaded.backbone
    device = next(network.parameters()).device
    dtype = autocast_dtype(device)
    channels = network.config.in_chans
    loader = eval_loader(
        pictures, transform, batch_size=batch_size, workers=workers, channels=channels, skipped=skipped
    )
    patches = (transform.image_size // network.patch_size) ** 2
    at_once = max(1, _TOKENS // patches) if device.type == "cpu" else batch_size
    # Made outside of inference mode, so that a probe may be trained on them.
    cls = torch.empty(len(pictures), blocks, network.embed_dim)
    patch_mean = torch.empty(len(pictures), network.embed_dim)
    index = torch.empty(len(pictures), dtype=torch.int64)
    done = 0
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
        _bar(f"features of {loaded.source}", len(pictures), show=show) as bar,
    ):
        for batch, places in loader:
            index[done : done + len(places)] = places
            for images in torch.split(batch.to(device, non_blocking=True), at_once):
                tokens = network.last_blocks(transform.normalise(images), blocks)
                rows = slice(done, done + len(images))
                cls[rows] = torch.stack([block.cls for block in tokens], dim=1).float().cpu()
                patch_mean[rows] = tokens[-1].patches.float().mean(dim=1).cpu()
                done += len(images)
                bar.update(len(images))
    return Features(cls[:done], patch_mean[:done], pictures.labels[index[:done]], index[:done])


def on_best_device(loaded: LoadedBackbone) -> LoadedBackbone:
    """The network moved there, with the form of attention that is fast on it."""
    device = best_device()
    loaded.backbone.to(device).set_fused_attention(fused_attention_pays(device))
    return loaded


def check_health(features: Features, source: str) -> None:
    """Refuse features that no evaluation can say anything of.

    Raises:
        UserError: They are not finite, zero, or the same for every picture.
    """
    last = features.cls[:, -1]
    broken = ~(features.cls.flatten(1).isfinite().all(dim=1) & features.patch_mean.isfinite().all(dim=1))
    if broken.any():
        raise UserError(
            f"{source}: the features of {int(broken.sum()):,} of {len(broken):,} pictures are not finite numbers; "
            "training has diverged: take an earlier checkpoint, or train again with a smaller learning rate"
        )
    zero = last.norm(dim=1) < 1e-6
    if zero.any():
        raise UserError(
            f"{source}: the features of {int(zero.sum()):,} of {len(zero):,} pictures are zero; "
            "the network is damaged: take another checkpoint"
        )
    if len(last) > 1 and (found := float(spread(last))) < COLLAPSED:
        raise UserError(
            f"{source}: the features have collapsed: every picture gets nearly the same ones (spread {found:.1e}; "
            f"healthy networks lie between 0.1 and 1, below {COLLAPSED:g} only rounding errors tell pictures apart); "
            "take an earlier checkpoint, or train again and watch the health lines of the run"
        )


def check_size(image_size: int, patch_size: int) -> None:
    """Refuse pictures that do not divide into whole patches.

    Raises:
        UserError: They do not; with the nearest size that would do.
    """
    if image_size % patch_size:
        near = max(1, round(image_size / patch_size)) * patch_size
        raise UserError(
            f"data.image_size={image_size} is not a multiple of the network's patch size {patch_size}; "
            f"the nearest is data.image_size={near}"
        )


def _bar(text: str, total: int, *, show: bool) -> tqdm[NoReturn]:
    """A progress bar over pictures; without a terminal there is none."""
    return tqdm(total=total, desc=text, unit=" pictures", disable=None if show else True)
