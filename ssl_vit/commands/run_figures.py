"""Figures of a run: those drawn during training, the views of its first step, and reconstructions."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import cast

import lightning as L
import torch
from PIL import Image

from ssl_vit.config.methods import MethodConfig, ViewsConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, UnreadableImageError, evenly_spaced
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL
from ssl_vit.methods import METHODS
from ssl_vit.methods.base import SSLMethod
from ssl_vit.models.attention_maps import cls_attention
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.callbacks.image_logger import LoggedImage, Renderer
from ssl_vit.training.resume_checks import DATA, IMAGES
from ssl_vit.visualization.first_step_views import (
    Pretext,
    RunSettings,
    load_first_step,
    read_run_settings,
    views_figure,
)
from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.overlays import make_overlay_inputs, overlay_grid
from ssl_vit.visualization.reconstructions import compute_reconstructions, draw_reconstructions, mean_distances

ATTENTION_MASS = 0.6  # kept in the masks, as in DINO's figure


def training_figures(config: PretrainConfig, method: SSLMethod) -> dict[str, Renderer]:
    """Return the figures that a run draws during training, by name; none where no process has the whole model."""
    if config.trainer.strategy == "fsdp":
        return {}
    views = config.method.views
    transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
    figures: dict[str, Renderer] = {"attention": partial(_attention_grid, transform=transform)}
    if "reconstruction" in method.figures():
        figures["reconstruction"] = partial(_reconstruction_grid, views=views, seed=config.seed)
    return figures


def _attention_grid(module: L.LightningModule, images: list[LoggedImage], *, transform: EvalTransform) -> Image.Image:
    backbone = cast(SSLMethod, module).eval_backbone
    rows = []
    for name, image, _ in images:
        maps = cls_attention(backbone, transform.normalize(image[None].to(backbone.device)))[0, 0].cpu()
        rows.append((name, make_overlay_inputs(image, maps, ATTENTION_MASS, None)))
    return overlay_grid(rows)


def _reconstruction_grid(
    module: L.LightningModule, images: list[LoggedImage], *, views: ViewsConfig, seed: int
) -> Image.Image:
    restorer = cast(SSLMethod, module).figures()["reconstruction"]
    crops = torch.stack([image.crop for image in images])  # (B, C, S, S)
    return draw_reconstructions(compute_reconstructions(crops, restorer.corrupt, restorer.restore, views, seed=seed))


def training_views_figure(run: Path, *, count: int = 4) -> TitledFigure:
    """Draw the images of a run's first step with their views.

    Raises:
        UserError: The folder holds no pretraining run, or its images are not where they were or have changed.
    """
    settings = read_run_settings(run)
    dataset = _learned_from(run, settings)
    with tempfile.TemporaryDirectory() as folder:
        skipped = SkippedImageLog(Path(folder) / "skipped_images.txt")
        pretext = pretext_of(settings.method)
        seen = load_first_step(settings, dataset, pretext, count=count, skipped=skipped)
    kinds = {"global": settings.method.views.global_crops, "local": settings.method.views.local_crops}
    views = " and ".join(f"{of.count} {kind} views of {of.size} px" for kind, of in kinds.items() if of.count)
    text = (
        f"The first {len(seen)} images of the run's first step with their {views}, as the model sees them. "
        "The frame with a view's number and color shows its crop box."
    )
    if seen[0].pretext:
        text += (
            " The method rotates each view and corrupts parts of it with noise and blocks of other images; its target "
            "is the rotated view."
        )
    if not (run / DATA).is_file():
        text += " The run stored no image list: these views are of the images that are there now."
    return TitledFigure("Training views", views_figure(seen), text)


def pretext_of(config: MethodConfig) -> Pretext:
    """Return the function that makes inputs and targets of the views."""
    return partial(METHODS[config.name].pretext_views, config)


def reconstruction_figure(run: Path, checkpoint: Path | None = None, *, count: int = 8) -> TitledFigure | None:
    """Draw reconstructions of `count` of a run's images, evenly spaced, always with the same corruption.

    Without `checkpoint`, its last one is loaded. None if the method does not restore images or the file has no such
    model.

    Raises:
        UserError: The folder holds no pretraining run, its images are not where they were, or the checkpoint does
            not fit exactly.
    """
    settings = read_run_settings(run)
    method = settings.method
    restorer = METHODS[method.name].load_figures(checkpoint or run, method, settings.backbone).get("reconstruction")
    if restorer is None:
        return None
    dataset = build_dataset(settings.data.source, settings.data.root).with_range(settings.data.range)
    transform = EvalTransform(method.views.global_crops.size, 0.875, method.views.mean, method.views.std)
    crops = []
    for index in evenly_spaced(len(dataset), count).tolist():
        try:
            crops.append(transform(dataset.read(index, settings.backbone.in_chans)))
        except UnreadableImageError:
            continue
    if not crops:
        raise UserError(f"{settings.data.root}: none of the images that would be restored can be read")
    found = compute_reconstructions(
        torch.stack(crops), restorer.corrupt, restorer.restore, method.views, seed=settings.seed
    )
    text = f"{len(found)} images, corrupted as in training, and their reconstructions."
    if over := mean_distances([one.on_hidden for one in found]):
        text += " On the hidden pixels " + ", ".join(
            f"{'the model' if name == MODEL else name} has L1 {far.l1:.3f} and PSNR {far.psnr:.1f} dB"
            for name, far in over.items()
        )
    return TitledFigure(
        "Reconstructions", draw_reconstructions(found), f"{text}. L1 and PSNR are of values from 0 to 1."
    )


def _learned_from(run: Path, settings: RunSettings) -> ImageDataset:
    """Return the images that a run trains on, without those added to the folder since.

    Raises:
        UserError: They are not where they were, or have changed.
    """
    dataset = build_dataset(settings.data.source, settings.data.root).with_range(settings.data.range)
    try:
        fingerprint = json.loads((run / DATA).read_text(encoding="utf-8"))["fingerprint"]
        if dataset.fingerprint(sizes=False) == fingerprint:
            return dataset
        before = PackedPaths.load(run / IMAGES) if isinstance(dataset, ImageFolder) else None
    except FileNotFoundError:  # an earlier version wrote no fingerprint
        return dataset
    except (OSError, ValueError, LookupError, TypeError):
        before = None
    if before is None or not isinstance(dataset, ImageFolder) or not set(before) <= set(dataset.names):
        raise UserError(
            f"{settings.data.root}: the images have changed since the run, so its first step cannot be shown"
        )
    return dataset.with_names(before)
