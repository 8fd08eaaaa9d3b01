"""Frozen features: one pass over the pictures yields all that the evaluations need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.config import Workers
from ssl_vit.data.loading import eval_loader
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.losses.diversity import spread
from ssl_vit.models.backbone import timm_arguments
from ssl_vit.models.weights import LoadedBackbone, state_sha256
from ssl_vit.training.hardware import autocast_dtype, best_device, fused_attention_pays
from ssl_vit.transforms.evaluation import EvalTransform

_TOKENS = 2500  # of a forward pass on a CPU: its activations stay in the cache
_CHECKED = 1 << 14  # pictures at a time: what is mapped from a file need not fit into memory
COLLAPSED = 1e-3  # spread below which features only tell rounding errors apart


@dataclass(frozen=True)
class Features:
    """What a network says of N pictures; pictures that could not be read are missing.

    Float32 in memory; of a store, float16 that is read from the disk when it is used. Take what you need of them, a
    block say, and then its `.float()`; never write into them.
    """

    cls: Tensor  # (N, blocks, D): [CLS] of the last blocks, each after the final norm, the last block last
    patch_mean: Tensor  # (N, D), of the same type: mean patch token of the last block, after the final norm
    labels: Tensor  # (N,) int64
    index: Tensor  # (N,) int64, places in the set of pictures

    def take(self, rows: Tensor) -> Features:
        """The features of some of the pictures."""
        return Features(self.cls[rows], self.patch_mean[rows], self.labels[rows], self.index[rows])


class Described(NamedTuple):
    """What is kept of B pictures."""

    cls: Tensor  # (B, blocks, D) float32
    patch_mean: Tensor  # (B, D) float32; (B, 0) where there are no patch tokens


class Describer(Protocol):
    """Says of whole pictures what is kept of them: a network, or the pixels themselves."""

    title: str  # for progress bars
    transform: EvalTransform
    channels: int  # that it wants pictures to have
    blocks: int  # that it describes a picture by
    most_blocks: int  # that it could
    shape: tuple[int, int]  # width D of a block, and of the mean patch token

    def identity(self) -> dict[str, Any]:
        """All that decides over what it says but the pictures and `blocks`, as plain containers."""
        ...

    def tolerance(self) -> float:
        """How far rounding may move what it says of a picture, relative to its length."""
        ...

    def __call__(self, images: Tensor) -> Iterator[Described]:
        """What it says of pictures (B, C, S, S) uint8, in their order, some at a time."""
        ...


class NetworkTokens:
    """The tokens of a frozen network on its device, in bfloat16 where that is good at it; a `Describer`.

    Args:
        loaded: The network, in evaluation mode.
        transform: Has made the pictures one size, and normalises them.
        blocks: How many last blocks to keep the [CLS] token of.
    """

    def __init__(self, loaded: LoadedBackbone, transform: EvalTransform, *, blocks: int) -> None:
        network = loaded.backbone
        self.network = network
        self.transform = transform
        self.blocks = blocks
        self.title = f"features of {loaded.source}"
        self.channels = network.config.in_chans
        self.most_blocks = len(network.vit.blocks)
        self.shape = (network.embed_dim, network.embed_dim)
        self.device = next(network.parameters()).device
        self.dtype = autocast_dtype(self.device)

    def identity(self) -> dict[str, Any]:
        """The weights as they are in memory, the architecture, what it computes in, and the transform."""
        config = self.network.config
        return {
            "kind": "network",
            "weights": state_sha256(self.network.vit.state_dict()),
            "backbone": {"name": config.name, **timm_arguments(config)},
            "forward": str(self.dtype or torch.float32).removeprefix("torch."),
            "transform": self.transform.describe(),
        }

    def tolerance(self) -> float:
        """Bfloat16 moves features of small and large ViTs by 1 to 3 % of their length, between devices by as much."""
        return 0.05 if self.dtype else 0.005

    def __call__(self, images: Tensor) -> Iterator[Described]:
        """Tokens of pictures (B, C, S, S) uint8: on a GPU of all at once, on a CPU of a few at a time."""
        patches = (images.shape[-1] // self.network.patch_size) ** 2
        at_once = max(1, _TOKENS // patches) if self.device.type == "cpu" else max(1, len(images))
        for part in torch.split(images.to(self.device, non_blocking=True), at_once):
            yield self._pass(part)

    @torch.inference_mode()
    def _pass(self, images: Tensor) -> Described:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            tokens = self.network.last_blocks(self.transform.normalise(images), self.blocks)
        cls = torch.stack([block.cls for block in tokens], dim=1).float().cpu()  # (B, blocks, D)
        return Described(cls, tokens[-1].patches.float().mean(dim=1).cpu())


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
    """A network's features of all readable pictures, in memory.

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
    describe = NetworkTokens(loaded, transform, blocks=blocks)
    return in_memory(describe, pictures, batch_size=batch_size, workers=workers, skipped=skipped, show=show)


def in_memory(
    describe: Describer,
    pictures: Pictures,
    *,
    batch_size: int,
    workers: Workers,
    skipped: SkippedPictures,
    show: bool = True,
) -> Features:
    """What is said of all readable pictures, as float32.

    Raises:
        UserError: No picture can be read.
    """
    width, patch_width = describe.shape
    # Made outside of inference mode, so that a probe may be trained on them.
    cls = torch.empty(len(pictures), describe.blocks, width)
    patch_mean = torch.empty(len(pictures), patch_width)
    index = torch.empty(len(pictures), dtype=torch.int64)
    done = 0
    for places, said in described(
        describe, pictures, batch_size=batch_size, workers=workers, skipped=skipped, show=show
    ):
        rows = slice(done, done + len(places))
        cls[rows], patch_mean[rows], index[rows] = said.cls, said.patch_mean, places
        done += len(places)
    if not done:
        raise none_readable(skipped)
    return Features(cls[:done], patch_mean[:done], pictures.labels[index[:done]], index[:done])


def described(
    describe: Describer,
    pictures: Pictures,
    *,
    batch_size: int,
    workers: Workers,
    skipped: SkippedPictures,
    show: bool = True,
) -> Iterator[tuple[Tensor, Described]]:
    """The places (B,) int64 of readable pictures, ascending, and what is said of them, some at a time."""
    loader = eval_loader(
        pictures,
        describe.transform,
        batch_size=batch_size,
        workers=workers,
        channels=describe.channels,
        skipped=skipped,
    )
    with _bar(describe.title, len(pictures), show=show) as bar:
        for images, places, broken in loader.batches:
            for picture in broken:
                skipped.record(picture)
            done = 0
            for said in describe(images) if len(images) else ():
                yield places[done : done + len(said.cls)], said
                done += len(said.cls)
                bar.update(len(said.cls))
            bar.update(len(broken))


def none_readable(skipped: SkippedPictures) -> UserError:
    """The error of pictures that are all broken."""
    return UserError(f"none of the pictures can be read; {skipped.path} says why")


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
    count, broken, zero = len(features.cls), 0, 0
    for cls, patch_mean in zip(
        torch.split(features.cls, _CHECKED), torch.split(features.patch_mean, _CHECKED), strict=True
    ):
        broken += int((~(cls.flatten(1).isfinite().all(dim=1) & patch_mean.isfinite().all(dim=1))).sum())
        zero += int((cls[:, -1].float().norm(dim=1) < 1e-6).sum())
    if broken:
        raise UserError(
            f"{source}: the features of {broken:,} of {count:,} pictures are not finite numbers (or are beyond 65,504, "
            "the largest that float16 holds); training has diverged: take an earlier checkpoint, or train again with "
            "a smaller learning rate"
        )
    if zero:
        raise UserError(
            f"{source}: the features of {zero:,} of {count:,} pictures are zero; "
            "the network is damaged: take another checkpoint"
        )
    if count > 1 and (found := float(spread(a_few(features.cls[:, -1])))) < COLLAPSED:
        raise UserError(
            f"{source}: the features have collapsed: every picture gets nearly the same ones (spread {found:.1e}; "
            f"healthy networks lie between 0.1 and 1, below {COLLAPSED:g} only rounding errors tell pictures apart); "
            "take an earlier checkpoint, or train again and watch the health lines of the run"
        )


def a_few(features: Tensor, most: int = 1 << 15) -> Tensor:
    """At most so many of features (N, D), spread over the set, as float32: enough for a measure of all."""
    return features[:: -(-len(features) // most)].float()


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
