"""Python API: the commands as functions, with their keys as overrides, and with datasets of your own.

What a command reads from `data.root` may also be a map-style `torch.utils.data.Dataset` of images or (image, label)
pairs; see `ssl_vit.data.sources.torch_dataset.TorchDataset` for what an image may be.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from ssl_vit.commands import load_config as configuration
from ssl_vit.commands.finetune import finetune as run_finetune
from ssl_vit.commands.knn import evaluate as evaluate_knn
from ssl_vit.commands.linear import evaluate as evaluate_linear
from ssl_vit.commands.pretrain import pretrain as run_pretrain
from ssl_vit.config.evaluate import FinetuneConfig, KNNConfig, LinearConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog
from ssl_vit.data.dataset_factory import TrainTestSplit
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.data.sources.torch_dataset import TorchDataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.extractor import BackboneExtractor, Features, check_size, extract, on_best_device
from ssl_vit.evaluation.results.eval_result import EvalResult
from ssl_vit.models.attention_maps import cls_attention, resize_to_patch_multiple
from ssl_vit.models.checkpoint import LoadedBackbone, Positions, Weights
from ssl_vit.models.checkpoint import load_backbone as load_checkpoint
from ssl_vit.runtime.errors import UserError

Images = str | Path | Dataset[Any] | Tensor  # a folder, an image file, a dataset, or a batch (N, C, H, W) uint8


class FrozenBackbone(LoadedBackbone):
    """Frozen backbone that brings the transform of its images."""

    __slots__ = ()

    def transform(self, image: object, *, image_size: int | None = None, crop_ratio: float = 0.875) -> Tensor:
        """Transform an image as the evaluations do: resize, center crop, normalize as in the training.

        Args:
            image: A path, a PIL image, a uint8 tensor (H, W) or (C, H, W), or a uint8 array (H, W) or (H, W, C).
            image_size: Side S of the crop in pixels; None: the size that the model was trained at.
            crop_ratio: S over the short side that an image is resized to, in (0, 1].

        Returns:
            (C, S, S) float32, on the device of the model.

        Raises:
            UserError: It is no such image, or the size does not fit the model.
            UnreadableImageError: The file cannot be read.
        """
        config = self.backbone.config
        size = image_size or config.img_size
        check_size(size, config.patch_size)
        transform = EvalTransform(size, crop_ratio, self.mean, self.std)
        dataset = (
            load_images_at(Path(image))
            if isinstance(image, str | Path)
            else TorchDataset(cast("Dataset[Any]", [image]))
        )
        pixels = transform(dataset.with_range(self.value_range).read(0, config.in_chans))
        return transform.normalize(pixels[None].to(self.backbone.device))[0]


def load_backbone(
    checkpoint: str | Path,
    weights: Weights = "teacher",
    *,
    require_cls: bool = True,
    num_heads: int | None = None,
    positions: Positions = "timm",
) -> FrozenBackbone:
    """Load a frozen backbone with its normalization and transform.

    Args:
        checkpoint: Whatever `checkpoint=` accepts: a run directory, a `.ckpt`, an exported `.safetensors`, an official
            file, `timm:<model>`, `random:<any of these>`.
        weights: Teacher or student, if the file contains both.
        require_cls: Refuse models without a pooled class token.
        num_heads: Number of attention heads, for files that do not tell it.
        positions: Interpolation of the position embeddings at other image sizes: timm's, or official: DINO's own.

    Raises:
        UserError: There is no such file or model, or its weights do not fit exactly.
    """
    loaded = load_checkpoint(checkpoint, weights, require_cls=require_cls, num_heads=num_heads, positions=positions)
    return FrozenBackbone(*loaded)


def load_config(*overrides: str) -> PretrainConfig:
    """Compose the configuration of `ssl-vit pretrain` from `conf/` and overrides, and validate it.

    Args:
        *overrides: As on the command line: `"data.root=photos"`, `"method=sit"`.

    Raises:
        UserError: Naming every unknown key and every value out of range.
    """
    return configuration.load_config("pretrain", list(overrides), PretrainConfig)


def pretrain(*overrides: str, dataset: Dataset[Any] | None = None) -> Path:
    """Pretrain as `ssl-vit pretrain` does, and return the run directory.

    Args:
        *overrides: As on the command line: `"data.root=photos"`, `"run.name=photos"`.
        dataset: Images to train on instead of those of `data.root`: a map-style dataset, without augmentation.

    Raises:
        UserError: The configuration, the images or the run directory are not usable, or training failed.
    """
    if dataset is None:
        return run_pretrain(load_config(*overrides))
    images = TorchDataset(dataset)
    return run_pretrain(load_config(f"data.root={images.root}", *overrides), images)


def finetune(*overrides: str) -> Path:
    """Fine-tune and test as `ssl-vit finetune` does, and return the run directory.

    Args:
        *overrides: As on the command line: `"checkpoint=runs/photos"`, `"data.root=labeled"`.

    Raises:
        UserError: The configuration, the model, the images or the run directory are not usable, or training failed.
    """
    return run_finetune(configuration.load_config("finetune", list(overrides), FinetuneConfig))


def knn(*overrides: str, train: Dataset[Any] | None = None, test: Dataset[Any] | None = None) -> EvalResult:
    """Classify frozen features by kNN as `ssl-vit knn` does; write the result and return it.

    Args:
        *overrides: As on the command line: `"checkpoint=runs/photos"`, `"data.root=labeled"`.
        train: Labeled images instead of those of `data`: a map-style dataset of (image, label) pairs.
        test: Images to classify; without them each training image is classified by the others (leave-one-out).

    Raises:
        UserError: The model or the labeled images are missing, do not fit, or allow no evaluation.
    """
    words, split = _labeled(overrides, train, test)
    return evaluate_knn(configuration.load_config("knn", words, KNNConfig), split)[0]


def linear_probe(*overrides: str, train: Dataset[Any] | None = None, test: Dataset[Any] | None = None) -> EvalResult:
    """Train a linear probe on frozen features as `ssl-vit linear` does; write the result and return it.

    Args:
        *overrides: As on the command line: `"checkpoint=runs/photos"`, `"data.root=labeled"`, `"solver=ridge"`.
        train: Labeled images instead of those of `data`: a map-style dataset of (image, label) pairs.
        test: Images to test on; without them a fifth of the training images is held out.

    Raises:
        UserError: The model or the labeled images are missing, do not fit, or allow no evaluation.
    """
    words, split = _labeled(overrides, train, test)
    config = configuration.load_config("linear", words, LinearConfig)
    if split is not None and config.protocol != "held-out":
        raise UserError(f"protocol={config.protocol} reads its images from data.root: train and test are for held-out")
    return evaluate_linear(config, split)[0]


def extract_features(
    checkpoint: str | Path | LoadedBackbone,
    images: Images,
    *,
    blocks: int = 1,
    image_size: int | None = None,
    crop_ratio: float = 0.875,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Features:
    """Extract frozen features, normalized as the model was trained, into memory.

    Args:
        checkpoint: Whatever `checkpoint=` accepts, or what `load_backbone` returned.
        images: A folder, an image file, a map-style dataset, or a tensor (N, C, H, W) uint8.
        blocks: Number of last blocks whose [CLS] token is kept.
        image_size: Side of the center crop in pixels; None: the size that the model was trained at.
        crop_ratio: Side of the crop over the short side that an image is resized to, in (0, 1].
        batch_size: Images loaded together.
        num_workers: Loading processes.

    Returns:
        `cls` (N, blocks, D), `patch_mean` (N, D), `labels` (N,), -1 where unknown, and `index` (N,): the readable
        images among all.

    Raises:
        UserError: The checkpoint does not load, or no image can be read.
    """
    loaded = _loaded(checkpoint)
    size = image_size or loaded.backbone.config.img_size
    check_size(size, loaded.backbone.patch_size)
    with tempfile.TemporaryDirectory() as folder:
        transform = EvalTransform(size, crop_ratio, loaded.mean, loaded.std)
        return extract(
            BackboneExtractor(loaded, transform, blocks=blocks),
            _dataset(images).with_range(loaded.value_range),
            batch_size=batch_size,
            num_workers=num_workers,
            skipped=SkippedImageLog(Path(folder) / "skipped_images.txt"),
            show=False,
        )


def attention_maps(
    checkpoint: str | Path | LoadedBackbone, images: Images, *, max_side: int | None = None
) -> list[Tensor]:
    """Compute the attention of the last block's [CLS] query over the patches, at each image's own resolution.

    Args:
        checkpoint: Whatever `checkpoint=` accepts, or what `load_backbone` returned.
        images: A folder, an image file, a map-style dataset, or a tensor (N, C, H, W) uint8.
        max_side: Pixels; larger images are reduced before the model sees them. None: never.

    Returns:
        For each image (heads, rows, columns) float32 on the CPU; each map sums to 1.

    Raises:
        UserError: The checkpoint does not load, has no class token or no plain attention.
        UnreadableImageError: An image cannot be read.
    """
    loaded = _loaded(checkpoint)
    backbone, dataset = loaded.backbone, _dataset(images).with_range(loaded.value_range)
    transform = EvalTransform(backbone.config.img_size, 1.0, loaded.mean, loaded.std)
    maps = []
    for index in range(len(dataset)):
        image = dataset.read(index, backbone.config.in_chans)
        fitted = resize_to_patch_multiple(image, backbone.patch_size, max_side)
        maps.append(cls_attention(backbone, transform.normalize(fitted[None].to(backbone.device)))[0, 0].cpu())
    return maps


def _loaded(checkpoint: str | Path | LoadedBackbone) -> LoadedBackbone:
    return on_best_device(checkpoint if isinstance(checkpoint, LoadedBackbone) else load_checkpoint(checkpoint))


def _dataset(images: Images) -> ImageDataset:
    if isinstance(images, str | Path):
        return load_images_at(Path(images))
    if isinstance(images, Tensor) and images.ndim != 4:
        raise UserError(f"images: a tensor has the shape (N, C, H, W), got {tuple(images.shape)}")
    return TorchDataset(images)


def _labeled(
    overrides: tuple[str, ...], train: Dataset[Any] | None, test: Dataset[Any] | None
) -> tuple[list[str], TrainTestSplit | None]:
    """Return the overrides, and the datasets that replace those of `data.root`."""
    if train is None:
        if test is not None:
            raise UserError("test needs train beside it")
        return list(overrides), None
    known, asked = TorchDataset(train), None if test is None else TorchDataset(test)
    for name, given in (("train", known), ("test", asked)):
        if given is not None and (given.labels < 0).any():
            raise UserError(f"{name}={given.root}: every item needs a label of 0 or more: return (image, label) pairs")
    if len(known.classes) < 2:
        raise UserError(f"train={known.root}: two or more classes are needed")
    if asked is not None and asked.classes != known.classes:
        raise UserError(f"train has the classes {known.classes}, test has {asked.classes}: they must be the same")
    return [f"data.root={known.root}", *overrides], TrainTestSplit(known, asked)
