"""Learning rates of a backbone that starts from weights: frozen, then ramped, lower for earlier layers."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from timm.models._manipulate import group_with_matcher

from ssl_vit.config.pretrain import StartConfig
from ssl_vit.methods.schedules import TrainingPlan
from ssl_vit.models.backbone import Backbone

_FEW, _MANY = 20_000, 100_000  # images
_FEW_LR, _MANY_LR = 1e-5, 5e-5  # that for many images at a batch of _LR_BATCH
_LR_BATCH = 1024


class BackboneRates(NamedTuple):
    """Factors of the schedule `lr`, which is that of the heads."""

    frozen_steps: int
    ramp_steps: int
    scales: dict[str, float]  # by the parameter's name in the backbone

    def factor(self, step: int) -> float:
        """Return the factor of the whole backbone: 0 while it is frozen, rising linearly, then 1."""
        since = step - self.frozen_steps
        return 0.0 if since < 0 else min(1.0, (since + 1) / (self.ramp_steps + 1))


def make_backbone_rates(
    config: StartConfig, plan: TrainingPlan, backbone: Backbone, *, peak_lr: float, num_images: int
) -> BackboneRates:
    """Return the rates of a run; layer l of L gets layer_decay^(L - l), as in BEiT (arXiv 2106.08254).

    The layers are those of timm: embeddings, each block, and the final norm, which has the whole `backbone_lr`.

    Raises:
        ValueError: The run is not longer than the freeze and the ramp.
    """
    frozen, ramp = (
        span.steps(plan.steps_per_epoch, plan.total_steps) for span in (config.freeze_backbone, config.ramp)
    )
    if frozen + ramp >= plan.total_steps:
        raise ValueError(
            f"start.freeze_backbone={config.freeze_backbone} and start.ramp={config.ramp} are {frozen + ramp:,} steps, "
            f"and the run has {plan.total_steps:,}: the backbone would hardly learn"
        )
    lr = config.backbone_lr
    if lr == "auto":
        lr = default_backbone_lr(num_images, plan.batch_size)
    scale = 1.0 if lr is None else lr / peak_lr
    layers = group_with_matcher(backbone.named_parameters(), backbone.layer_patterns(""), reverse=True)
    last = max(layers.values())
    return BackboneRates(
        frozen,
        ramp,
        {
            name: scale
            * config.layer_decay ** (last - layer)
            * (config.patch_embed_lr if re.search(r"(^|\.)patch_embed\.", name) else 1.0)
            for name, layer in layers.items()
        },
    )


def default_backbone_lr(num_images: int, batch_size: int) -> float:
    """Return the learning rate for a number of images.

    1e-5 for up to 20,000 (NeCo, arXiv 2408.11054), 5e-5 · √(batch / 1024) from 100,000 on (DINOv3's square-root rule);
    between the two a straight line in the logarithms.
    """
    many = _MANY_LR * math.sqrt(batch_size / _LR_BATCH)
    share = math.log(num_images / _FEW) / math.log(_MANY / _FEW)
    return float(_FEW_LR * (many / _FEW_LR) ** min(1.0, max(0.0, share)))


def published_backbone_lr(batch_size: int) -> float:
    """Return the highest learning rate that published continued trainings have, for any number of images."""
    return max(default_backbone_lr(_FEW, batch_size), default_backbone_lr(_MANY, batch_size))
