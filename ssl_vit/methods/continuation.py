"""Training that starts from weights: they are loaded into the method, parts of them frozen, and an anchor added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from torch import Tensor

from ssl_vit.config.pretrain import AnchorConfig, StartConfig
from ssl_vit.methods.anchor import Anchor
from ssl_vit.methods.backbone_rates import make_backbone_rates
from ssl_vit.methods.base import SSLMethod
from ssl_vit.models.adaptation import adapt_backbone
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.ema import init_teacher
from ssl_vit.models.trainable import select_trainable


class MethodState(NamedTuple):
    """Weights of a method beside its backbone, as they are in the checkpoint of a run."""

    method: str
    weights: str  # teacher or student, whose heads belong to the backbone that was loaded
    tensors: Mapping[str, Tensor]


def load_start_weights(method: SSLMethod, source: Backbone, heads: MethodState | None) -> bool:
    """Load a backbone, and the heads where they fit, into student and teacher, which are then equal.

    Returns:
        Whether the heads were loaded. They stay new if the source has none, or those of another method or shape.

    Raises:
        UserError: The backbone has another shape.
    """
    student = _student_backbone(method)
    student.load_state_dict(adapt_backbone(source, student.config).state_dict())
    found = _matching_heads(method, heads) if heads else {}
    if found:
        method.load_state_dict(method.state_dict() | found)
    if teacher := getattr(method, "teacher", None):
        init_teacher(teacher, method.get_submodule("student"))
    return bool(found)


def _matching_heads(method: SSLMethod, heads: MethodState) -> dict[str, Tensor]:
    """Return the tensors for all that is not in a backbone; empty if one is missing or of another shape."""
    if heads.method != method.config.name:
        return {}
    own = {name: value for name, value in method.state_dict().items() if ".backbone." not in name}
    found = {name: heads.tensors.get(name.replace("student.", f"{heads.weights}.", 1)) for name in own}
    if any(value is None or value.shape != own[name].shape for name, value in found.items()):
        return {}
    return cast(dict[str, Tensor], found)


def prepare_continuation(method: SSLMethod, start: StartConfig, anchor: AnchorConfig, *, num_images: int) -> None:
    """Add what a run from weights has besides its method: learning rates, frozen or low-rank parts, and the anchor.

    All of it is in the run's checkpoints, so that a resumed run does not need the source.

    Raises:
        ValueError: The run is not longer than the freeze and the ramp, or the backbone has fewer blocks.
    """
    student = _student_backbone(method)
    if anchor.name != "none":
        frozen = Backbone(student.config.model_copy(update={"drop_path": 0.0}))
        frozen.load_state_dict(student.state_dict())
        method.anchor = Anchor(anchor, frozen)
    select_trainable(student, start.trainable)
    teacher = getattr(method, "teacher", None)
    if teacher and start.lora_rank:
        select_trainable(teacher.backbone, start.trainable)
        init_teacher(teacher, method.get_submodule("student"))
    method.rates = make_backbone_rates(start, method.plan, student, peak_lr=method.peak_lr, num_images=num_images)


def _student_backbone(method: SSLMethod) -> Backbone:
    return cast(Backbone, method.get_submodule("student.backbone"))
