"""Online evaluation: accuracy of frozen features on a few labeled images during training."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from ssl_vit.config.methods import ViewsConfig
from ssl_vit.config.pretrain import OnlineEvalConfig
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset, class_balanced_order, escape_path
from ssl_vit.data.dataset_factory import TrainTestSplit, build_labeled_folder_splits
from ssl_vit.data.sources.split_folders import folder_layout
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, ridge_path
from ssl_vit.evaluation.features.extractor import Features, validate_features
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.models.backbone import Backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.callbacks.validation import extract_in_training
from ssl_vit.training.checkpointing import BEST, link_checkpoint, read_global_step
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)

TEMPERATURE = 0.07  # of kNN's votes, as in DINO's protocol
L2 = [10 ** (exponent / 2) for exponent in range(-8, 3)]  # penalties of the linear classifier, 1e-4 to 10


class OnlineEvalData(NamedTuple):
    """The images of all evaluations of a run."""

    train: Subset  # kNN searches in them, and the linear classifier is fitted on them
    val: Subset  # disjoint from `train`


class EvalPoint(NamedTuple):
    """Accuracies in [0, 1] by metric, NaN where they cannot be computed."""

    step: int  # optimizer steps done
    values: dict[str, float]


def select_online_data(config: OnlineEvalConfig, dataset: ImageDataset, *, seed: int) -> OnlineEvalData | None:
    """Select train and val images, as balanced over the classes as possible; None without two classes and a val image.

    Args:
        config: Its `root` names a labeled folder, whose `val/` or `test/` then gives the val images.
        dataset: The training images of the run, used without a `root` if they lie in class folders, which splits are
            not. Of each class at most a fifth become val images, or one of two to four.
        seed: For the selection.

    Raises:
        UserError: There are no labeled images in `root`.
    """
    if config.root is None and _are_splits(dataset):
        return None
    split = build_labeled_folder_splits(config.root) if config.root else TrainTestSplit(dataset, None)
    train, test = split.with_range(dataset.value_range)
    order = class_balanced_order(train.labels, seed=seed)
    train_index, val_source = order.indices, train
    if test is None:
        spare = (order.rank < (order.class_size // 5).clamp(min=1)) & (order.class_size > 1)
        val_index = order.indices[spare][: config.val_images]
        train_index = train_index[~torch.isin(train_index, val_index)]
    else:
        val_source = test
        val_index = class_balanced_order(test.labels, seed=seed).indices[: config.val_images]
    train_index = train_index[: config.train_images]
    if not len(val_index) or len(torch.unique(train.labels[train_index])) < 2:
        return None
    return OnlineEvalData(Subset(train, train_index), Subset(val_source, val_index))


def _are_splits(dataset: ImageDataset) -> bool:
    """Return whether the folders of the images are splits (train/, val/), or may be, instead of classes."""
    return folder_layout(dataset.classes, lambda _: ()).kind != "classes"


def accuracies(train: Features, val: Features, *, ks: list[int]) -> dict[str, float]:
    """Return the accuracy of kNN for each k and of a linear classifier, on [CLS] of the last block.

    Raises:
        UserError: The features have diverged or collapsed.
    """
    for part in (train, val):
        validate_features(part, "the run")
    index, queries = (LabeledFeatures(part.cls[:, -1].float(), part.labels) for part in (train, val))
    ranks = knn(index, queries, ks=ks, temperature=TEMPERATURE).ranks
    return {f"online/knn@{k}": _mean(ranks[k] == 0) for k in ks} | {"online/linear": _linear(index, queries)}


class OnlineEval(L.Callback):
    """Evaluation of the features before the first step, every n epochs and at the end; it keeps the best checkpoint.

    The labels are used for these numbers alone. The first process evaluates, and the others wait for it at the next
    collective operation. Features that cannot be evaluated give NaN, and the run continues.

    Raises:
        UserError: There are no labeled images in `online.root`.
    """

    def __init__(
        self, config: OnlineEvalConfig, run: RunState, views: ViewsConfig, *, seed: int, skipped: SkippedImageLog
    ) -> None:
        self.config = config
        self.run = run
        self.skipped = skipped
        self.best_path = run.path / "checkpoints" / BEST
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
        self.names = [*(f"online/knn@{k}" for k in config.k), "online/linear"]
        self.data: OnlineEvalData | None = None
        self.protocol: str | None = None  # equal for values that can be compared
        if config.every_epochs:
            self.data = select_online_data(config, run.dataset, seed=seed)
        if self.data:
            images = "".join(part.fingerprint(sizes=False) for part in self.data)
            self.protocol = hashlib.sha256(f"{images} {self.names}".encode()).hexdigest()
        self.initial: EvalPoint | None = None  # before the first step
        self.last: EvalPoint | None = None
        self.best: EvalPoint | None = None  # by kNN with the first k; its weights are in best_knn.ckpt
        self.selects = config.root is not None if config.select_best == "auto" else config.select_best
        self.improved = False  # whether this step is the best so far, which RunCheckpoint then keeps

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to keep the same best checkpoint as an uninterrupted one."""
        points = {"initial": self.initial, "last": self.last, "best": self.best}
        return {"protocol": self.protocol} | {name: point and point._asdict() for name, point in points.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.data and state_dict["protocol"] != self.protocol:
            if state_dict["best"]:
                log.warning("online.* or the labeled images have changed: the search for the best checkpoint restarts")
            return
        self.protocol = state_dict["protocol"]
        self.initial, self.last, self.best = (
            state_dict[name] and EvalPoint(**state_dict[name]) for name in ("initial", "last", "best")
        )
        if not self.selects:
            self.best = None

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

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        self.improved = False
        at_end = trainer.global_step == trainer.max_steps
        every = self.config.every_epochs
        if at_end or (every and trainer.is_last_batch and (trainer.current_epoch + 1) % every == 0):
            self._evaluate(trainer, module)

    def _evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.data or not trainer.is_global_zero:
            return
        started, step = time.perf_counter(), trainer.global_step
        backbone = cast(Backbone, module.eval_backbone)
        try:
            train, val = (
                extract_in_training(backbone, part, self.transform, skipped=self.skipped) for part in self.data
            )
            values = accuracies(train, val, ks=self.config.k)
        except UserError as error:  # also if the files were deleted while training continues from memory
            log.warning(f"no online accuracy at step {step:,}: {error}")
            values = dict.fromkeys(self.names, math.nan)
        row = {**values, "online/seconds": time.perf_counter() - started, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=max(0, step - 1))
        self._update(EvalPoint(step, values))

    def _update(self, point: EvalPoint) -> None:
        self.last = point
        if point.step == 0:
            self.initial = point
        if point.step == 0 or not self.selects:
            return
        best = self.best.values[self.names[0]] if self.best else -math.inf
        self.improved = point.values[self.names[0]] > best
        if self.improved:
            self.best = point

    def plan(self) -> list[str]:
        """Return a line on what will be evaluated, and how precise it is; nothing if it is turned off."""
        if not self.config.every_epochs:
            return []
        if not self.data:
            if self.config.root is None and _are_splits(self.run.dataset):
                return [
                    f"No online evaluation: the folders {_names(self.run.dataset.classes)} of data.root look like "
                    "splits, not classes. Use online.root=FOLDER for a folder of labeled images"
                ]
            return [
                "No online evaluation: it needs two or more class folders with images to spare. Use online.root=FOLDER "
                "for a folder of labeled images"
            ]
        train, val = map(len, self.data)
        low, high = wilson(val // 2, val)
        ks = ", ".join(f"{k} (all {train})" if k > train else str(k) for k in self.config.k)
        epochs = "epoch" if self.config.every_epochs == 1 else f"{self.config.every_epochs} epochs"
        return [
            f"Online evaluation every {epochs}: kNN (k={ks}) and a linear classifier, {train:,} train / {val:,} val "
            f"images (95 % CI about ±{50 * (high - low):.1f} points)",
            self._plan_classes(),
        ]

    def _plan_classes(self) -> str:
        """Return which folders are taken for classes, and whether they select a checkpoint."""
        root = self.config.root
        classes = self.run.dataset.classes if root is None or self.data is None else self.data.train.classes
        source = f"the folders of {'data.root' if root is None else f'online.root={root}'}"
        purpose = "for these numbers only: the training uses no labels"
        best = "they also select best_knn.ckpt" if self.selects else "online.select_best=true keeps the best checkpoint"
        return f"  Its classes are {source} ({_names(classes)}), {purpose}; {best}"

    def summary(self) -> list[str]:
        """Return a table of the accuracies in percent, and how to evaluate the best checkpoint."""
        if not self.last:
            return []
        points = [("random weights", self.initial), ("last", self.last), ("best kNN", self.best)]
        names = [name.removeprefix("online/") for name in self.last.values]
        lines = [f"{'Online accuracy in %':<21}{'step':>9}" + "".join(f"{name:>9}" for name in names)]
        for title, point in points:
            if point and (point.step or title == "random weights"):
                values = "".join(f"{100 * value:>9.1f}" for value in point.values.values())
                lines.append(f"  {title:<19}{point.step:>9,}{values}")
        if self.best:
            lines.append(f"Best checkpoint: {self.best_path} (selected on these images; evaluate it on other data):")
            lines.append(f"  ssl-vit knn checkpoint={self.best_path} data.root=LABELED")
        return lines


def _names(classes: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(escape_path(name) for name in classes[:most])
    return f"{shown}, ... {len(classes)} in all" if len(classes) > most else shown


def _linear(train: LabeledFeatures, val: LabeledFeatures) -> float:
    """Return the accuracy of ridge regression with the penalty chosen by leave-one-out on the train images."""
    classes, labels = torch.unique(torch.cat([train.labels, val.labels]), return_inverse=True)
    train_labels, target = labels.split([len(train.labels), len(val.labels)])
    fit = best_ridge(ridge_path(train.features, train_labels, classes=len(classes), l2=L2), train_labels)
    return _mean(fit.probe.logits(val.features).argmax(dim=1) == target)


def _mean(correct: Tensor) -> float:
    return float(correct.float().mean())
