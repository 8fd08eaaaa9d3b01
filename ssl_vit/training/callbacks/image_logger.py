"""Log images during training, such as attention maps, always of the same few input images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.config.pretrain import BackboneConfig, ImageLoggingConfig
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError, evenly_spaced
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.models.attention_maps import resize_to_patch_multiple
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.loggers import ResumableWandbLogger
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)

MIN_STEPS = 200  # between two figures, so that they do not slow down runs with short epochs
MAX_SIZE = 2  # times the size of the global views: larger images are reduced to it


class LoggedImage(NamedTuple):
    """One of the fixed input images."""

    name: str
    image: Tensor  # (C, h, w) uint8, the whole image, its sides multiples of the patch size
    crop: Tensor  # (C, S, S) uint8, as the model is trained on


Renderer = Callable[[L.LightningModule, list[LoggedImage]], Image.Image]


class ImageLogger(L.Callback):
    """Writer of `images/<name>-<step>.jpg` for each renderer, also to wandb if the run logs there.

    It draws before the first step, every n epochs (with short ones, at least 200 steps apart) and at the end, in the
    first process. Training does not depend on it: it uses no random numbers, and a figure that cannot be drawn is
    skipped.

    Raises:
        UserError: There are no images in `image_logging.root`.
    """

    def __init__(
        self,
        config: ImageLoggingConfig,
        run: RunState,
        views: ViewsConfig,
        backbone: BackboneConfig,
        *,
        render: Mapping[str, Renderer],
        skipped: SkippedImageLog,
    ) -> None:
        self.backbone = backbone
        self.render = render if config.every_epochs is not None else {}
        self.skipped = skipped
        self.folder = run.path / "images"
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
        self.every = max(config.every_epochs or 1, -(-MIN_STEPS // run.plan.steps_per_epoch))  # epochs
        own_root = config.root if self.render else None
        self.has_own_images = own_root is not None
        self.dataset = build_dataset("folder", own_root) if own_root else run.dataset
        self.dataset.with_range(run.dataset.value_range)
        self.indices = evenly_spaced(len(self.dataset), config.num_images).tolist()
        self.images: list[LoggedImage] = []
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the images of `image_logging.root` by name: they stay the same when others are added."""
        return {"names": [self.dataset.name(index) for index in self.indices] if self.has_own_images else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = state_dict["names"]
        if self.has_own_images and len(names) == len(self.indices):
            index_of = {self.dataset.name(index): index for index in range(len(self.dataset))}
            self.indices = [index_of[name] for name in names if name in index_of] or self.indices

    def summary(self) -> list[str]:
        """Return a line about where the figures are."""
        return [f"Images: {self.folder}"] if self.render else []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._draw(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        at_end = trainer.global_step == trainer.max_steps
        if at_end or (trainer.is_last_batch and (trainer.current_epoch + 1) % self.every == 0):
            self._draw(trainer, module)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.render or not trainer.is_global_zero:
            return
        training = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # the images have other sizes
                for name, render in self.render.items():
                    self._write(trainer, module, name, render)
        finally:
            for part, mode in training.items():
                part.training = mode

    def _write(self, trainer: L.Trainer, module: L.LightningModule, name: str, render: Renderer) -> None:
        step = trainer.global_step
        try:
            self.images = self.images or self._read()
            figure = render(module, self.images)
            self.folder.mkdir(exist_ok=True)
            with atomic_write(self.folder / f"{name}-{step:07d}.jpg") as file:
                figure.save(file, "JPEG", quality=90, subsampling=0)
            for logger in trainer.loggers:
                if isinstance(logger, ResumableWandbLogger):
                    logger.log_image(f"images/{name}", [figure], step=max(0, step - 1))
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if name not in self.warned:
                log.warning(f"no {name} figure at step {step:,}: {error}")
            self.warned.add(name)

    def _read(self) -> list[LoggedImage]:
        """Return the fixed images, without unreadable ones and those smaller than a patch."""
        images = []
        for index in self.indices:
            try:
                image = self.dataset.read(index, self.backbone.in_chans)
                whole = resize_to_patch_multiple(image, self.backbone.patch_size, MAX_SIZE * self.transform.image_size)
                images.append(LoggedImage(self.dataset.name(index), whole, self.transform(image)))
            except UnreadableImageError as error:
                self.skipped.record(error)
            except UserError:
                continue
        if not images:
            raise UserError("none of the images can be used")
        return images
