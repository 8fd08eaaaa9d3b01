"""Health checks of a training run: each looks at one row of metrics and returns a warning with a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

MIN_INFORMATION = 0.05  # nats that the teacher's assignment carries about an image; healthy runs have 1 and more
MIN_FEATURE_STD = 0.05  # healthy runs have 0.3 to 1

Metrics = Mapping[str, float]  # a row of metrics by column, such as train/loss


class HealthWarning(NamedTuple):
    """A problem under a stable name, with its numbers and a remedy."""

    name: str
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"[{self.name}] {self.finding}. {self.remedy}"


HealthCheck = Callable[[Metrics], HealthWarning | None]


def check_feature_std(metrics: Metrics) -> HealthWarning | None:
    """Return a warning if all images have nearly the same features."""
    if metrics["train/feature_std"] >= MIN_FEATURE_STD:
        return None
    return HealthWarning(
        "features-collapse",
        f"the feature std is {metrics['train/feature_std']:.3f}, where 1 is uniform on the sphere and 0 means that all "
        "images have the same features",
        "Try a lower method.optimizer.lr, a longer method.optimizer.warmup, or backbone.init=jax for a small ViT.",
    )


def check_teacher_distance(metrics: Metrics) -> HealthWarning | None:
    """Return a warning if the teacher's weights equal the student's."""
    if metrics["train/teacher_distance"] != 0:
        return None
    return HealthWarning(
        "teacher-is-student",
        "the teacher's weights are those of the student",
        "Set 'method.teacher.momentum=[0.996,1.0]', or for a short run [0.98,0.995].",
    )


def check_assignments(metrics: Metrics, *, prototypes: int) -> HealthWarning | None:
    """Return a warning if the teacher assigns all images alike, evenly to all prototypes or to a single one."""
    information, entropy = metrics["train/assignment_mutual_information"], metrics["train/teacher_entropy"]
    if information >= MIN_INFORMATION:
        return None
    highest = math.log(prototypes)
    numbers = (
        f"the teacher's assignment carries {information:.3f} nats of information about an image, its entropy is "
        f"{entropy:.2f} of at most {highest:.2f}"
    )
    if entropy > highest / 2:
        return HealthWarning(
            "uniform-collapse",
            f"collapsed to the uniform assignment: {numbers}",
            "Try a lower method.teacher.temperature, backbone.init=jax for a small ViT, weaker augmentation, "
            "or a lower method.teacher.momentum for a short run.",
        )
    return HealthWarning(
        "single-collapse",
        f"collapsed to one prototype: {numbers}",
        "Try a higher method.teacher.temperature (up to 0.07), method.teacher.center_momentum=0.9, "
        "or a lower method.optimizer.lr.",
    )
