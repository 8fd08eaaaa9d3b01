"""Accuracy of frozen features on a few labeled images: which images, which of them are right, what has changed."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.config.pretrain import OnlineEvalConfig
from ssl_vit.data.dataset import ImageDataset, Subset, class_balanced_order
from ssl_vit.data.dataset_factory import TrainTestSplit, build_labeled_folder_splits
from ssl_vit.data.sources.split_folders import folder_layout
from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, ridge_path
from ssl_vit.evaluation.features.extractor import Features, validate_features
from ssl_vit.evaluation.results.comparison import paired_change
from ssl_vit.evaluation.results.eval_result import Change
from ssl_vit.methods.health import HealthWarning

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
    right: dict[str, Tensor] | None = (
        None  # by metric, (val images,) int8: 1 classified correctly, 0 not, -1 unreadable
    )


class LabeledSet:
    """Labeled images that the features of a run are measured on: before the first step, and last.

    Args:
        name: Before the metrics' names, as in `online/linear`.
        data: None where there are none, or the evaluation is turned off.
        ks: Numbers of neighbors that vote.
    """

    def __init__(self, name: str, data: OnlineEvalData | None, ks: list[int]) -> None:
        self.name = name
        self.data = data
        self.ks = ks
        self.metrics = [*(f"{name}/knn@{k}" for k in ks), f"{name}/linear"]
        self.protocol: str | None = None  # equal for values that can be compared
        if data:
            images = "".join(part.fingerprint(sizes=False) for part in data)
            self.protocol = hashlib.sha256(f"{images} {self.metrics}".encode()).hexdigest()
        self.initial: EvalPoint | None = None
        self.last: EvalPoint | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to show and compare the same as an uninterrupted one."""
        points = {"initial": self.initial, "last": self.last}
        return {"protocol": self.protocol} | {name: point and point._asdict() for name, point in points.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> bool:
        """Load the state unless it is of other images or metrics; return whether it was loaded."""
        if self.data and state_dict["protocol"] != self.protocol:
            return False
        self.protocol = state_dict["protocol"]
        self.initial, self.last = (state_dict[key] and EvalPoint(**state_dict[key]) for key in ("initial", "last"))
        return True

    def measure(self, train: Features, val: Features, *, step: int) -> EvalPoint:
        """Classify the val images, and keep the result.

        Raises:
            UserError: The features have diverged or collapsed.
        """
        assert self.data
        found = classified_right(train, val, ks=self.ks)
        values, right = {}, {}
        for metric, each in zip(self.metrics, found.values(), strict=True):
            values[metric] = float(each.float().mean())
            right[metric] = torch.full((len(self.data.val),), -1, dtype=torch.int8)
            right[metric][val.index] = each.to(torch.int8).cpu()
        return EvalPoint(step, values, right)

    def keep(self, point: EvalPoint) -> None:
        """Keep a measurement as the last, and as the first one before the first step."""
        self.last = point
        if point.step == 0:
            self.initial = point

    def changes(self) -> list[Change]:
        """Return how kNN with the first k and the linear classifier have changed, on the images read both times."""
        if not self.initial or not self.last or not self.last.step:
            return []
        changes = []
        for metric in (self.metrics[0], self.metrics[-1]):
            before, after = ((point.right or {}).get(metric) for point in (self.initial, self.last))
            if before is not None and after is not None and (both := (before >= 0) & (after >= 0)).any():
                name = metric if self.name != "online" else metric.removeprefix("online/")
                changes.append(paired_change(name, before[both] == 1, after[both] == 1))
        return changes

    def check(self, warning: str, remedy: str) -> HealthWarning | None:
        """Return a warning if the features are worse than at the start: the paired interval lies below 0."""
        if worse := [change for change in self.changes() if change.high < 0]:
            return HealthWarning(warning, "; ".join(map(str, worse)), remedy)
        if self.initial and self.last and math.isnan(self.last.values[self.metrics[0]]) and self.initial.right:
            start = 100 * self.initial.values[self.metrics[0]]
            finding = f"the features cannot be evaluated, where {self.metrics[0]} was {start:.1f} at the start"
            return HealthWarning(warning, finding, remedy)
        return None


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
    if config.root is None and are_splits(dataset):
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


def are_splits(dataset: ImageDataset) -> bool:
    """Return whether the folders of the images are splits (train/, val/), or may be, instead of classes."""
    return folder_layout(dataset.classes, lambda _: ()).kind != "classes"


def classified_right(train: Features, val: Features, *, ks: list[int]) -> dict[str, Tensor]:
    """Return which val images (N,) kNN for each k and a linear classifier get right, on [CLS] of the last block.

    Raises:
        UserError: The features have diverged or collapsed.
    """
    for part in (train, val):
        validate_features(part, "the run")
    index, queries = (LabeledFeatures(part.cls[:, -1].float(), part.labels) for part in (train, val))
    ranks = knn(index, queries, ks=ks, temperature=TEMPERATURE).ranks
    return {f"knn@{k}": ranks[k] == 0 for k in ks} | {"linear": _linear(index, queries)}


def _linear(train: LabeledFeatures, val: LabeledFeatures) -> Tensor:
    """Classify by ridge regression with the penalty chosen by leave-one-out on the train images; return (N,) bool."""
    classes, labels = torch.unique(torch.cat([train.labels, val.labels]), return_inverse=True)
    train_labels, target = labels.split([len(train.labels), len(val.labels)])
    fit = best_ridge(ridge_path(train.features, train_labels, classes=len(classes), l2=L2), train_labels)
    right: Tensor = fit.probe.logits(val.features).argmax(dim=1) == target
    return right
