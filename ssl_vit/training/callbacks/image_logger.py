"""Images while the run goes on: attention, and for SiT reconstructions, of the same few images at every time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError, evenly_spaced
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.methods.base import ImageRestorer, SSLMethod
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.attention_maps import cls_attention, resize_to_patch_multiple
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.loggers import ResumableWandbLogger
from ssl_vit.training.run_dir import RunState
from ssl_vit.visualization.overlays import make_overlay_inputs, overlay_grid
from ssl_vit.visualization.reconstructions import compute_reconstructions, draw_reconstructions

log = logging.getLogger(__name__)

LEAST_STEPS = 200  # between panels, so that short epochs do not make them a burden
MASS = 0.6  # share of the attention in the masks, as in DINO's figure
SIDE = 2  # times the side of the global views: larger images are reduced to it


class Shown(NamedTuple):
    """One of the fixed images."""

    name: str
    fitted: Tensor  # (C, h, w) uint8, whole, its sides multiples of the patch
    crop: Tensor  # (C, S, S) uint8, as the model is trained on


class ImageLogger(L.Callback):
    """Writes `panels/attention-<step>.jpg` and, where the run restores images, `panels/reconstruction-<step>.jpg`.

    Before the first step, every n epochs (of short ones so many that 200 steps lie between) and at the end; to wandb
    as well, if the run logs there. The first process draws. Nothing of the training depends on it: it draws no random
    numbers, and a panel that cannot be made is missing.

    Args:
        config: Of the run.
        plan: Of the run.
        start: Of the run, with its images.
        skipped: Takes the images that cannot be read.

    Raises:
        UserError: There are no images in `panels.root`.
    """

    def __init__(self, config: PretrainConfig, plan: TrainingPlan, start: RunState, skipped: SkippedImageLog) -> None:
        self.config = config
        self.skipped = skipped
        self.folder = config.run.path / "panels"
        views, root = config.method.views, config.image_logging.root
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
        # With fsdp no process has the whole model.
        self.wanted = config.image_logging.every_epochs is not None and config.trainer.strategy != "fsdp"
        self.every = max(config.image_logging.every_epochs or 1, -(-LEAST_STEPS // plan.steps_per_epoch))  # epochs
        self.own = self.wanted and root is not None
        self.dataset = build_dataset("folder", root) if self.wanted and root else start.dataset
        self.places = evenly_spaced(len(self.dataset), config.image_logging.num_images).tolist()
        self.shown: list[Shown] = []
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """The images of `panels.root` by name: they stay the same though others come besides."""
        return {"names": [self.dataset.name(place) for place in self.places] if self.own else []}

    def summary(self) -> list[str]:
        """Where the panels are."""
        return [f"Panels: {self.folder}"] if self.wanted else []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = state_dict["names"]
        if self.own and len(names) == len(self.places):
            place_of = {self.dataset.name(place): place for place in range(len(self.dataset))}
            self.places = [place_of[name] for name in names if name in place_of] or self.places

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._draw(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        at_end = trainer.global_step == trainer.max_steps
        if at_end or (trainer.is_last_batch and (trainer.current_epoch + 1) % self.every == 0):
            self._draw(trainer, module)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.wanted or not trainer.is_global_zero:
            return
        backbone = cast(Backbone, module.eval_backbone)
        makers = {"attention": partial(self._attention, backbone)}
        model: nn.Module = backbone
        if restorer := cast(SSLMethod, module).figures().get("reconstruction"):
            model = restorer.model
            makers["reconstruction"] = partial(self._reconstruction, restorer)
        training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # the images have sizes of their own
                for name, make in makers.items():
                    self._keep(trainer, name, make)
        finally:
            model.train(training)

    def _keep(self, trainer: L.Trainer, name: str, make: Callable[[], Image.Image]) -> None:
        step = trainer.global_step
        try:
            self.shown = self.shown or self._read()
            panel = make()
            self.folder.mkdir(exist_ok=True)
            with atomic_write(self.folder / f"{name}-{step:07d}.jpg") as file:
                panel.save(file, "JPEG", quality=90, subsampling=0)
            for logger in trainer.loggers:
                if isinstance(logger, ResumableWandbLogger):
                    logger.log_image(f"panels/{name}", [panel], step=max(0, step - 1))
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if name not in self.warned:
                log.warning(f"no {name} panel at step {step:,}: {error}")
            self.warned.add(name)

    def _read(self) -> list[Shown]:
        """The fixed images; those that cannot be read, and those smaller than a patch, are left out."""
        backbone = self.config.backbone
        shown = []
        for place in self.places:
            try:
                image = self.dataset.read(place, backbone.in_chans)
                fitted = resize_to_patch_multiple(image, backbone.patch_size, SIDE * self.transform.image_size)
                shown.append(Shown(self.dataset.name(place), fitted, self.transform(image)))
            except UnreadableImageError as broken:
                self.skipped.record(broken)
            except UserError:
                continue
        if not shown:
            raise UserError("none of the images can be used")
        return shown

    def _attention(self, backbone: Backbone) -> Image.Image:
        rows = []
        for name, fitted, _ in self.shown:
            x = self.transform.normalize(fitted[None].to(backbone.device))
            maps = cls_attention(backbone, x)[0, 0].cpu()  # (heads, rows, columns)
            if not maps.isfinite().all():
                raise UserError("the attention is not finite")
            rows.append((name, make_overlay_inputs(fitted, maps, MASS, None)))
        return overlay_grid(rows)

    def _reconstruction(self, restorer: ImageRestorer) -> Image.Image:
        crops = torch.stack([one.crop for one in self.shown])  # (B, C, S, S)
        views, seed = self.config.method.views, self.config.seed
        return draw_reconstructions(
            compute_reconstructions(crops, restorer.corrupt, restorer.restore, views, seed=seed)
        )
