"""What a method returns: the result of a training step, and what can be drawn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ssl_vit.models.backbone import Tokens


class StudentOutput(NamedTuple):
    """What the student computed of the global views."""

    images: Tensor  # (V·B, C, H, W), as it got them
    tokens: Tokens  # with gradient


class StepResult(NamedTuple):
    """Output of a method's `step`."""

    loss: Tensor  # ()
    features: Tensor  # (V, B, D), [CLS] tokens of the global views without gradient, for the health metrics
    logs: dict[str, Tensor]  # scalars
    student: StudentOutput  # for the anchor of a run that starts from weights


class ImageRestorer(NamedTuple):
    """A corruption of images and the model's reconstruction, for the figure `reconstruction`."""

    corrupt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images (B, C, S, S), keys (B,) -> images, mask
    restore: Callable[[Tensor], Tensor]  # normalized corrupted images (B, C, S, S) -> normalized images


class PretextViews(NamedTuple):
    """Input and target that a method makes of the views (2·B, C, S, S), one view after the other."""

    target: Tensor  # (2·B, C, S, S), the rotated views
    corrupted: Tensor  # (2·B, C, S, S), the input of the model
    mask: Tensor  # (2·B, 1, S, S) bool, the corrupted pixels
    quarter: Tensor  # (2·B,), quarter turns clockwise
