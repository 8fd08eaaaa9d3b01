"""Online evaluation: accuracy of frozen features on a few labeled images during training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, cast

import lightning as L

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.config.pretrain import OnlineEvalConfig
from ssl_vit.data.dataset import SkippedImageLog, escape_path
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.methods.health import HealthWarning
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import START_WEIGHTS
from ssl_vit.runtime.atomic_io import JSONLWriter
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.callbacks.validation import evaluation_due, extract_in_training, load_start_weights_of
from ssl_vit.training.checkpointing import BEST, link_checkpoint, read_global_step
from ssl_vit.training.online_accuracy import EvalPoint, LabeledSet, are_splits, select_online_data
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)

REMEDY = (
    "Lower start.backbone_lr, freeze the backbone longer (start.freeze_backbone=30%), add an anchor (anchor=features), "
    "or keep the start weights: "
)


class OnlineEval(L.Callback):
    """Evaluation of the features before the first step, every n epochs and at the end; it keeps the best checkpoint.

    The labels are used for these numbers alone. The first process evaluates, and the others wait for it at the next
    collective operation. Features that cannot be evaluated give NaN, and the run continues.

    Of a run that starts from weights these are the first measurement: they are compared with the last one, image by
    image, and may be the best checkpoint themselves. Its verdicts are written to the journal at the end.

    Raises:
        UserError: There are no labeled images in `online.root` or `online.reference`.
    """

    def __init__(
        self,
        config: OnlineEvalConfig,
        run: RunState,
        views: ViewsConfig,
        *,
        seed: int,
        skipped: SkippedImageLog,
        journal: JSONLWriter,
        from_weights: bool = False,
    ) -> None:
        self.config = config
        self.run = run
        self.skipped = skipped
        self.journal = journal
        self.from_weights = from_weights
        self.best_path = run.path / "checkpoints" / BEST
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
        data = select_online_data(config, run.dataset, seed=seed) if config.every_epochs else None
        self.main = LabeledSet("online", data, config.k)
        self.sets = [self.main]  # and that of the reference
        if config.every_epochs and config.reference:
            reference = config.model_copy(update={"root": config.reference})
            data = select_online_data(reference, run.dataset, seed=seed)
            if data is None:
                raise UserError(
                    f"online.reference={config.reference}: it needs two or more classes with images to spare"
                )
            self.sets.append(LabeledSet("reference", data, config.k))
        self.best: EvalPoint | None = None  # by kNN with the first k; its weights are in best_knn.ckpt
        self.selects = config.root is not None if config.select_best == "auto" else config.select_best
        self.improved = False  # whether this step is the best so far, which RunCheckpoint then keeps

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to keep the same best checkpoint as an uninterrupted one."""
        return {
            **self.main.state_dict(),
            "best": self.best and self.best._asdict(),
            **{each.name: each.state_dict() for each in self.sets[1:]},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for each in self.sets[1:]:
            if each.name in state_dict:
                each.load_state_dict(state_dict[each.name])
        if not self.main.load_state_dict(state_dict):
            if state_dict["best"]:
                log.warning("online.* or the labeled images have changed: the search for the best checkpoint restarts")
            return
        if self.selects and state_dict["best"]:
            self.best = EvalPoint(**state_dict["best"])

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Make sure that `best_knn.ckpt` is the best that the resumed checkpoint knows of.

        It is not if the run was killed between writing the two, or if a checkpoint was damaged.
        """
        if not self.best or not trainer.is_global_zero or read_global_step(self.best_path) == self.best.step:
            return
        if self.run.checkpoint and self.best.step == self.run.done:
            link_checkpoint(self.run.checkpoint, BEST)
        else:
            log.warning(
                f"{self.best_path} is missing, damaged, or not that of step {self.best.step:,}: the search for the "
                "best checkpoint restarts"
            )
            self.best = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, module)
        elif self.from_weights and trainer.is_global_zero:
            self._measure_start(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        self.improved = False
        if trainer.global_step == trainer.max_steps or evaluation_due(trainer, self.config.every_epochs):
            self._evaluate(trainer, module)
            if trainer.global_step == trainer.max_steps and trainer.is_global_zero:
                for warning in self._verdicts():
                    self.journal.write(trainer.global_step - 1, **warning._asdict())

    def _evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        step, backbone = trainer.global_step, cast(Backbone, module.eval_backbone)
        for labeled in self.sets:
            if not labeled.data:
                continue
            started = time.perf_counter()
            point = self._measure(labeled, backbone, step)
            row = {**point.values, f"{labeled.name}/seconds": time.perf_counter() - started}
            for logger in trainer.loggers:
                logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=max(0, step - 1))
            if labeled is self.main:
                self._update(point)
            else:
                labeled.keep(point)

    def _measure(self, labeled: LabeledSet, backbone: Backbone, step: int) -> EvalPoint:
        assert labeled.data
        try:
            train, val = (
                extract_in_training(backbone, part, self.transform, skipped=self.skipped) for part in labeled.data
            )
            return labeled.measure(train, val, step=step)
        except UserError as error:  # also if the files were deleted while training continues from memory
            log.warning(f"no {labeled.name} accuracy at step {step:,}: {error}")
            return EvalPoint(step, dict.fromkeys(labeled.metrics, math.nan))

    def _measure_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure the start weights on images that were not measured before the first step, as these are new."""
        missing = [each for each in self.sets if each.data and not (each.initial and each.initial.right)]
        if missing and (start := load_start_weights_of(self.run, module.device)):
            for labeled in missing:
                labeled.initial = self._measure(labeled, start, 0)

    def _update(self, point: EvalPoint) -> None:
        self.main.keep(point)
        if not self.selects or (point.step == 0 and not self.from_weights):
            return
        metric = self.main.metrics[0]
        self.improved = point.values[metric] > (self.best.values[metric] if self.best else -math.inf)
        if self.improved:
            self.best = point

    def plan(self) -> list[str]:
        """Return a line on what will be evaluated, and how precise it is; nothing if it is turned off."""
        if not self.config.every_epochs:
            return []
        if not self.main.data:
            if self.config.root is None and are_splits(self.run.dataset):
                return [
                    f"No online evaluation: the folders {_names(self.run.dataset.classes)} of data.root look like "
                    "splits, not classes. Use online.root=FOLDER for a folder of labeled images"
                ]
            return [
                "No online evaluation: it needs two or more class folders with images to spare. Use online.root=FOLDER "
                "for a folder of labeled images"
            ]
        train, val = map(len, self.main.data)
        low, high = wilson(val // 2, val)
        ks = ", ".join(f"{k} (all {train})" if k > train else str(k) for k in self.config.k)
        epochs = "epoch" if self.config.every_epochs == 1 else f"{self.config.every_epochs} epochs"
        return [
            f"Online evaluation every {epochs}: kNN (k={ks}) and a linear classifier, {train:,} train / {val:,} val "
            f"images (95 % CI about ±{50 * (high - low):.1f} points)",
            self._plan_classes(),
            *(
                f"  Forgetting is measured on online.reference={self.config.reference} in the same way: "
                f"{len(each.data.train):,} train / {len(each.data.val):,} val images"
                for each in self.sets[1:]
                if each.data
            ),
        ]

    def _plan_classes(self) -> str:
        """Return which folders are taken for classes, and whether they select a checkpoint."""
        root = self.config.root
        classes = self.run.dataset.classes if root is None or not self.main.data else self.main.data.train.classes
        source = f"the folders of {'data.root' if root is None else f'online.root={root}'}"
        purpose = "for these numbers only: the training uses no labels"
        best = "they also select best_knn.ckpt" if self.selects else "online.select_best=true keeps the best checkpoint"
        return f"  Its classes are {source} ({_names(classes)}), {purpose}; {best}"

    def summary(self) -> list[str]:
        """Return a table of the accuracies in percent, the changes, and how to evaluate the best checkpoint."""
        lines = []
        for labeled in self.sets:
            best = self.best if labeled is self.main else None
            lines += self._table(labeled, best)
        if self.from_weights:
            lines += [str(change) for labeled in self.sets for change in labeled.changes()]
            lines += [f"Verdict: {warning}" for warning in self._verdicts()]
        if self.main.last and self.best:
            how = "selected on these images; evaluate it on other data"
            which = "the start weights, as none were better; " if not self.best.step else ""
            lines.append(f"Best checkpoint: {self.best_path} ({which}{how}):")
            lines.append(f"  ssl-vit knn checkpoint={self.best_path} data.root=LABELED")
        return lines

    def _table(self, labeled: LabeledSet, best: EvalPoint | None) -> list[str]:
        if not labeled.last:
            return []
        start = "start weights" if self.from_weights else "random weights"
        names = [name.partition("/")[2] for name in labeled.last.values]
        lines = [f"{f'{labeled.name.capitalize()} accuracy in %':<24}{'step':>6}" + "".join(f"{n:>9}" for n in names)]
        for title, point in ((start, labeled.initial), ("last", labeled.last), ("best kNN", best)):
            if point and (point.step or title != "last"):
                values = "".join(f"{100 * value:>9.1f}" for value in point.values.values())
                lines.append(f"  {title:<19}{point.step:>9,}{values}")
        return lines

    def _verdicts(self) -> list[HealthWarning]:
        """Return that the run is worse than its start weights, or has forgotten what they knew, where it is certain."""
        if not self.from_weights:
            return []
        remedy = f"{REMEDY}{self.run.path / START_WEIGHTS}."
        names = {"online": "worse-than-start", "reference": "forgetting"}
        return [found for each in self.sets if (found := each.check(names[each.name], remedy))]


def _names(classes: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(escape_path(name) for name in classes[:most])
    return f"{shown}, ... {len(classes)} in all" if len(classes) > most else shown
