"""Pictures while the run goes on: attention, and for SiT reconstructions, of the same few pictures at every time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_vit.attention.maps import cls_attention, fit_to_patches
from ssl_vit.attention.pictures import contact_sheet, make_example
from ssl_vit.config import PretrainConfig, SiTConfig
from ssl_vit.data.find import find_pictures
from ssl_vit.data.pictures import BrokenPicture, SkippedPictures, evenly
from ssl_vit.durable import durable
from ssl_vit.errors import UserError
from ssl_vit.inspection.reconstruction_sheet import reconstruction_sheet
from ssl_vit.inspection.reconstructions import reconstruct
from ssl_vit.methods.base import Plan
from ssl_vit.methods.restoring import restored, restores
from ssl_vit.methods.sit import SiT, SiTNetwork
from ssl_vit.models.backbone import Backbone
from ssl_vit.training.metrics import Wandb
from ssl_vit.training.runs import Start
from ssl_vit.transforms.evaluation import EvalTransform

log = logging.getLogger(__name__)

LEAST_STEPS = 200  # between panels, so that short epochs do not make them a burden
MASS = 0.6  # share of the attention in the masks, as in DINO's figure
SIDE = 2  # times the side of the global views: larger pictures are reduced to it


class Shown(NamedTuple):
    """One of the fixed pictures."""

    name: str
    fitted: Tensor  # (C, h, w) uint8, whole, its sides multiples of the patch
    crop: Tensor  # (C, S, S) uint8, as the network is trained on


class Panels(L.Callback):
    """Writes `panels/attention-<step>.jpg` and, where the run restores pictures, `panels/reconstruction-<step>.jpg`.

    Before the first step, every n epochs (of short ones so many that 200 steps lie between) and at the end; to wandb
    as well, if the run logs there. The first process draws. Nothing of the training depends on it: it draws no random
    numbers, and a panel that cannot be made is missing.

    Args:
        config: Of the run.
        plan: Of the run.
        start: Of the run, with its pictures.
        skipped: Takes the pictures that cannot be read.

    Raises:
        UserError: There are no pictures in `panels.root`.
    """

    def __init__(self, config: PretrainConfig, plan: Plan, start: Start, skipped: SkippedPictures) -> None:
        self.config = config
        self.skipped = skipped
        self.folder = config.run.path / "panels"
        views, root = config.method.views, config.panels.root
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
        # With fsdp no process has the whole network.
        self.wanted = config.panels.every_epochs is not None and config.trainer.strategy != "fsdp"
        self.every = max(config.panels.every_epochs or 1, -(-LEAST_STEPS // plan.steps_per_epoch))  # epochs
        self.own = self.wanted and root is not None
        self.pictures = find_pictures("folder", root) if self.wanted and root else start.pictures
        self.places = evenly(len(self.pictures), config.panels.pictures).tolist()
        self.shown: list[Shown] = []
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """The pictures of `panels.root` by name: they stay the same though others come besides."""
        return {"names": [self.pictures.name(place) for place in self.places] if self.own else []}

    def summary(self) -> list[str]:
        """Where the panels are."""
        return [f"Panels: {self.folder}"] if self.wanted else []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = state_dict["names"]
        if self.own and len(names) == len(self.places):
            place_of = {self.pictures.name(place): place for place in range(len(self.pictures))}
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
        backbone = cast(Backbone, module.target)
        makers = {"attention": partial(self._attention, backbone)}
        network: nn.Module = backbone
        if isinstance(module, SiT) and restores(module.config):
            network = module.student
            makers["reconstruction"] = partial(self._reconstruction, module.student, module.config)
        training = network.training
        network.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # the pictures have sizes of their own
                for name, make in makers.items():
                    self._keep(trainer, name, make)
        finally:
            network.train(training)

    def _keep(self, trainer: L.Trainer, name: str, make: Callable[[], Image.Image]) -> None:
        step = trainer.global_step
        try:
            self.shown = self.shown or self._read()
            panel = make()
            self.folder.mkdir(exist_ok=True)
            with durable(self.folder / f"{name}-{step:07d}.jpg") as file:
                panel.save(file, "JPEG", quality=90, subsampling=0)
            for logger in trainer.loggers:
                if isinstance(logger, Wandb):
                    logger.log_image(f"panels/{name}", [panel], step=max(0, step - 1))
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if name not in self.warned:
                log.warning(f"no {name} panel at step {step:,}: {error}")
            self.warned.add(name)

    def _read(self) -> list[Shown]:
        """The fixed pictures; those that cannot be read, and those smaller than a patch, are left out."""
        backbone = self.config.backbone
        shown = []
        for place in self.places:
            try:
                picture = self.pictures.read(place, backbone.in_chans)
                fitted = fit_to_patches(picture, backbone.patch_size, SIDE * self.transform.image_size)
                shown.append(Shown(self.pictures.name(place), fitted, self.transform(picture)))
            except BrokenPicture as broken:
                self.skipped.record(broken)
            except UserError:
                continue
        if not shown:
            raise UserError("none of the pictures can be used")
        return shown

    def _attention(self, backbone: Backbone) -> Image.Image:
        rows = []
        for name, fitted, _ in self.shown:
            x = self.transform.normalise(fitted[None].to(backbone.vit.patch_embed.proj.weight.device))
            maps = cls_attention(backbone, x)[0, 0].cpu()  # (heads, rows, columns)
            if not maps.isfinite().all():
                raise UserError("the attention is not finite")
            rows.append((name, make_example(fitted, maps, MASS, None)))
        return contact_sheet(rows)

    def _reconstruction(self, network: SiTNetwork, method: SiTConfig) -> Image.Image:
        crops = torch.stack([one.crop for one in self.shown])  # (B, C, S, S)
        return reconstruction_sheet(reconstruct(crops, partial(restored, network), method, seed=self.config.seed))
