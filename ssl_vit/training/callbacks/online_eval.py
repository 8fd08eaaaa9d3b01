"""Accuracy while the run goes on, on a few labeled images: the number that tells whether it learns."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from ssl_vit.config.pretrain import OnlineEvalConfig, PretrainConfig
from ssl_vit.data.class_balanced_subset import class_balanced_order
from ssl_vit.data.dataset import ImageDataset, SkippedImageLog, Subset
from ssl_vit.data.dataset_factory import TrainTestSplit, build_labeled_folder_splits
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, ridge_path
from ssl_vit.evaluation.features.extractor import Features, extract, validate_features
from ssl_vit.evaluation.results.statistics import wilson
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.checkpointing import BEST, link_checkpoint, read_global_step
from ssl_vit.training.run_dir import RunState

log = logging.getLogger(__name__)

TEMPERATURE = 0.07  # of the votes, as in DINO's protocol
L2 = [10 ** (exponent / 2) for exponent in range(-8, 3)]  # penalties of the linear head, 1e-4 to 10


class LabeledImages(NamedTuple):
    """The images of all evaluations of a run."""

    bank: Subset  # to search in, and to fit the linear head on
    queries: Subset  # to classify; never in the bank

    def fingerprint(self) -> str:
        """Equal for the same images in the same parts."""
        return "".join(part.fingerprint(sizes=False) for part in self)


class EvalPoint(NamedTuple):
    """Accuracies in [0, 1] by the names of their metrics, NaN where nothing can be said."""

    step: int  # optimizer steps done
    values: dict[str, float]


def choose_labeled(config: OnlineEvalConfig, dataset: ImageDataset, *, seed: int) -> LabeledImages | None:
    """The bank and the queries, as balanced over the classes as these allow; None without two classes and a query.

    Args:
        config: Its `root` names labeled images of their own, whose `val/` or `test/` are then the queries.
        dataset: That the run learns from: without a `root`, those in class folders. Of each class a fifth are
            queries at most, or one of two to four.
        seed: Chooses among them.

    Raises:
        UserError: There are no labeled images in `root`.
    """
    train, test = build_labeled_folder_splits(config.root) if config.root else TrainTestSplit(dataset, None)
    order = class_balanced_order(train.labels, seed=seed)
    bank, asking = order.indices, train
    if test is None:
        spare = (order.rank < (order.class_size // 5).clamp(min=1)) & (order.class_size > 1)
        queries = order.indices[spare][: config.val_images]
        bank = bank[~torch.isin(bank, queries)]
    else:
        asking = test
        queries = class_balanced_order(test.labels, seed=seed).indices[: config.val_images]
    bank = bank[: config.train_images]
    if not len(queries) or len(torch.unique(train.labels[bank])) < 2:
        return None
    return LabeledImages(Subset(train, bank), Subset(asking, queries))


def accuracies(bank: Features, queries: Features, *, ks: list[int]) -> dict[str, float]:
    """Of kNN for each k and of a linear head, on [CLS] of the last block.

    Raises:
        UserError: The features have diverged or collapsed.
    """
    for part in (bank, queries):
        validate_features(part, "the run")
    known, asking = (LabeledFeatures(part.cls[:, -1].float(), part.labels) for part in (bank, queries))
    ranks = knn(known, asking, ks=ks, temperature=TEMPERATURE).ranks
    return {f"online/knn@{k}": _share(ranks[k] == 0) for k in ks} | {"online/linear": _linear(known, asking)}


class OnlineEval(L.Callback):
    """Measures the features by the teacher's weights: before the first step, every n epochs and at the end.

    The labels are for these numbers alone. The first process measures, and the others wait for it where they next have
    to agree. Features of which nothing can be said give NaN, and the run goes on.

    Args:
        config: Of the run.
        start: Of the run; with the best checkpoint so far in its folder, if it goes on.
        skipped: Takes the images that cannot be read.

    Raises:
        UserError: There are no labeled images in `online.root`.
    """

    def __init__(self, config: PretrainConfig, start: RunState, skipped: SkippedImageLog) -> None:
        self.config = config.online
        self.start = start
        self.skipped = skipped
        self.folder = config.run.path / "checkpoints"
        views = config.method.views
        self.transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
        self.names = [*(f"online/knn@{k}" for k in config.online.k), "online/linear"]
        self.labeled: LabeledImages | None = None
        self.protocol: str | None = None  # equal for values that can be compared
        if self.config.every_epochs:
            self.labeled = choose_labeled(self.config, start.dataset, seed=config.seed)
        if self.labeled:
            self.protocol = hashlib.sha256(f"{self.labeled.fingerprint()} {self.names}".encode()).hexdigest()
        self.begun: EvalPoint | None = None  # with random weights
        self.last: EvalPoint | None = None
        self.best: EvalPoint | None = None  # by kNN with the first k; its weights are in best_knn.ckpt
        self.improved = False  # whether the step at hand is the best so far, which the Keeper then keeps

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to keep the same best as an uninterrupted one."""
        marks = {"begun": self.begun, "last": self.last, "best": self.best}
        return {"protocol": self.protocol} | {name: mark and mark._asdict() for name, mark in marks.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.labeled and state_dict["protocol"] != self.protocol:
            if state_dict["best"]:
                log.warning("online.* or the labeled images have changed: the best checkpoint is sought anew")
            return
        self.protocol = state_dict["protocol"]
        self.begun, self.last, self.best = (
            state_dict[name] and EvalPoint(**state_dict[name]) for name in ("begun", "last", "best")
        )

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """See to it that `best_knn.ckpt` is the best that the resumed checkpoint knows of.

        It is not if the run was killed between writing the one and the other, or if a checkpoint has been damaged.
        """
        if not self.best or not trainer.is_global_zero or read_global_step(self.folder / BEST) == self.best.step:
            return
        if self.start.checkpoint and self.best.step == self.start.done:
            link_checkpoint(self.start.checkpoint, BEST)
        else:
            log.warning(f"{self.folder / BEST} is not that of step {self.best.step:,}: the best is sought anew")
            self.best = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        self.improved = False
        at_end = trainer.global_step == trainer.max_steps
        every = self.config.every_epochs
        if at_end or (every and trainer.is_last_batch and (trainer.current_epoch + 1) % every == 0):
            self._measure(trainer, module)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.labeled or not trainer.is_global_zero:
            return
        began, step = time.perf_counter(), trainer.global_step
        backbone = cast(Backbone, module.eval_backbone)
        training = backbone.training
        backbone.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # its batches have sizes of their own
                bank, queries = (self._features(backbone, dataset) for dataset in self.labeled)
            values = accuracies(bank, queries, ks=self.config.k)
        except UserError as error:  # or the images are gone from the disk, and training may go on from memory
            log.warning(f"no accuracy at step {step:,}: {error}")
            values = dict.fromkeys(self.names, math.nan)
        finally:
            backbone.train(training)
        row = {**values, "online/seconds": time.perf_counter() - began, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=max(0, step - 1))
        self._judge(EvalPoint(step, values))

    def _judge(self, found: EvalPoint) -> None:
        self.last = found
        if found.step == 0:
            self.begun = found
            return
        value = found.values[self.names[0]]
        best = self.best.values[self.names[0]] if self.best else -math.inf
        self.improved = value > best
        if self.improved:
            self.best = found

    def _features(self, backbone: Backbone, dataset: Subset) -> Features:
        return extract(
            LoadedBackbone(backbone, self.transform.mean, self.transform.std, "the run", None, None),
            dataset,
            self.transform,
            blocks=1,
            batch_size=256,
            num_workers=0,
            skipped=self.skipped,
            show=False,
        )

    def plan(self) -> list[str]:
        """What will be measured, and how exactly so few images can tell; nothing if it is not wanted."""
        if not self.config.every_epochs:
            return []
        if not self.labeled:
            return [
                "No online evaluation: it takes two class folders or more with images to spare; online.root=FOLDER "
                "names labeled images"
            ]
        bank, queries = map(len, self.labeled)
        low, high = wilson(queries // 2, queries)
        ks = ", ".join(f"{k}, of which there are {bank}" if k > bank else str(k) for k in self.config.k)
        epochs = "epoch" if self.config.every_epochs == 1 else f"{self.config.every_epochs} epochs"
        return [
            f"Online evaluation every {epochs}: kNN (k = {ks}) and a linear head on {bank:,} labeled images "
            f"classify {queries:,} others; so many tell an accuracy to ± {50 * (high - low):.1f} points (95 %)"
        ]

    def summary(self) -> list[str]:
        """The accuracies in percent at the start, at the end and at the best, and how to evaluate the best."""
        marks = [("random weights", self.begun), ("last", self.last), ("best kNN", self.best)]
        if not self.last:
            return []
        names = [name.removeprefix("online/") for name in self.last.values]
        lines = [f"{'Online accuracy in %':<21}{'step':>9}" + "".join(f"{name:>9}" for name in names)]
        for title, mark in marks:
            if mark and (mark.step or title == "random weights"):
                values = "".join(f"{100 * value:>9.1f}" for value in mark.values.values())
                lines.append(f"  {title:<19}{mark.step:>9,}{values}")
        if self.best:
            path = self.folder / BEST
            lines.append(f"The best is {path}; it was chosen by these images, so judge it by others:")
            lines.append(f"  ssl-vit knn checkpoint={path} data.root=LABELLED")
        return lines


def _linear(known: LabeledFeatures, asking: LabeledFeatures) -> float:
    """Accuracy of the ridge whose penalty leave-one-out among the known images has chosen."""
    classes, labels = torch.unique(torch.cat([known.labels, asking.labels]), return_inverse=True)
    known_labels, truth = labels.split([len(known.labels), len(asking.labels)])
    fit = best_ridge(ridge_path(known.features, known_labels, classes=len(classes), l2=L2), known_labels)
    return _share(fit.probe.logits(asking.features).argmax(dim=1) == truth)


def _share(right: Tensor) -> float:
    return float(right.float().mean())
