"""Statistics of features without labels, of the start weights and during training from them."""

from __future__ import annotations

import logging
import math
import time
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.data.dataset import SkippedImageLog, Subset, evenly_spaced
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.nearest_neighbors import choose_engine, exact_search
from ssl_vit.evaluation.features.extractor import validate_features
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.feature_statistics import alignment, effective_rank, neighbor_stability, uniformity
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.callbacks.validation import evaluation_due, extract_in_training, load_start_weights_of
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)

IMAGES = 1000
NEIGHBORS = 10
METRICS = ("effective_rank", "alignment", "uniformity", "neighbor_stability")


class EnlargedCenter(EvalTransform):
    """A second view of an image: the middle of the first, with 3/4 of its side."""

    def __call__(self, image: Tensor) -> Tensor:
        """Transform an image (C, H, W) uint8 to (C, S, S) uint8."""
        whole, size = super().__call__(image), [self.image_size, self.image_size]
        center = tv.center_crop(whole, [self.image_size * 3 // 4] * 2)
        return cast(Tensor, tv.resize(center, size, InterpolationMode.BICUBIC, antialias=True))


class UnlabeledPoint(NamedTuple):
    """Statistics by metric, NaN where they cannot be computed."""

    step: int  # optimizer steps done
    values: dict[str, float]
    readable: Tensor | None = None  # (N,) int64: indices of the images
    neighbors: Tensor | None = None  # (N, NEIGHBORS) int16: rows of the nearest other images


class UnlabeledEval(L.Callback):
    """Statistics before the first step, every n epochs and at the end; None: never.

    They are those of [CLS] of the last block, of at most 1,000 evenly spaced training images.
    """

    def __init__(
        self, run: RunState, views: ViewsConfig, *, every_epochs: int | None, skipped: SkippedImageLog
    ) -> None:
        self.run = run
        self.every_epochs = every_epochs
        self.skipped = skipped
        how = views.global_crops.size, 0.875, views.mean, views.std
        self.transforms = EvalTransform(*how), EnlargedCenter(*how)
        self.images = Subset(run.dataset, evenly_spaced(len(run.dataset), IMAGES))
        self.initial: UnlabeledPoint | None = None
        self.last: UnlabeledPoint | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to compare with the start."""
        points = {"initial": self.initial, "last": self.last}
        return {name: point and point._asdict() for name, point in points.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.initial, self.last = (
            state_dict[name] and UnlabeledPoint(**state_dict[name]) for name in ("initial", "last")
        )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, module)
        elif self.every_epochs and not self.initial and trainer.is_global_zero:
            start = load_start_weights_of(self.run, module.device)
            self.initial = self._measure(start, 0) if start else None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == trainer.max_steps or evaluation_due(trainer, self.every_epochs):
            self._evaluate(trainer, module)

    def _evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.every_epochs or not trainer.is_global_zero:
            return
        started, step = time.perf_counter(), trainer.global_step
        point = self._measure(cast(Backbone, module.eval_backbone), step)
        self.last = point._replace(readable=None, neighbors=None)
        if step == 0:
            self.initial = point
        row = {f"unlabeled/{name}": value for name, value in point.values.items()}
        row |= {"unlabeled/seconds": time.perf_counter() - started, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=max(0, step - 1))

    def _measure(self, backbone: Backbone, step: int) -> UnlabeledPoint:
        try:
            whole, center = (
                extract_in_training(backbone, self.images, transform, skipped=self.skipped)
                for transform in self.transforms
            )
            validate_features(whole, "the run")
        except UserError as error:  # also if the files were deleted while training continues from memory
            log.warning(f"no statistics of features at step {step:,}: {error}")
            return UnlabeledPoint(step, dict.fromkeys(METRICS, math.nan))
        one, other = (part.cls[:, -1].float() for part in (whole, center))
        k = min(NEIGHBORS, len(one) - 1)
        unit = F.normalize(one, dim=1)
        own = torch.arange(len(unit), device=unit.device)
        neighbors = exact_search(unit, unit, k=k, exclude=own, engine=choose_engine("auto", unit.device)).indices
        kept = 1.0 if step == 0 else math.nan
        if step and self.initial and self.initial.neighbors is not None:
            before, readable = self.initial.neighbors, cast(Tensor, self.initial.readable)
            if torch.equal(readable, whole.index):
                kept = float(neighbor_stability(before, neighbors.cpu()))
        statistics = [float(value) for value in (effective_rank(one), alignment(one, other), uniformity(one))]
        values = dict(zip(METRICS, [*statistics, kept], strict=True))
        return UnlabeledPoint(step, values, whole.index, neighbors.to("cpu", torch.int16))

    def plan(self) -> list[str]:
        """Return a line on what will be evaluated; nothing if it is turned off."""
        if not self.every_epochs:
            return []
        return [
            f"Without labels: effective rank, alignment, uniformity and the {NEIGHBORS} nearest neighbors kept since "
            f"the start, of {len(self.images):,} images"
        ]

    def summary(self) -> list[str]:
        """Return a table of the start weights and of now."""
        if not self.last or not self.initial:
            return []
        titles = ("effective rank", "alignment", "uniformity", "neighbors kept")
        lines = [f"{'Without labels':<24}{'step':>6}" + "".join(f"{title:>16}" for title in titles)]
        for title, point in (("start weights", self.initial), ("last", self.last)):
            if point.step or point is self.initial:
                rank, *others, kept = point.values.values()
                cells = [f"{rank:.1f}", *(f"{value:.3f}" for value in others), f"{100 * kept:.1f} %"]
                lines.append(f"  {title:<19}{point.step:>9,}" + "".join(f"{cell:>16}" for cell in cells))
        lines.append("  These show change, not that it helped: that needs a few labels (online.root=FOLDER)")
        return lines
