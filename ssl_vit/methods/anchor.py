"""The anchor of a run that starts from weights: a frozen copy of the backbone, and a loss that keeps it near."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_vit.config.pretrain import AnchorConfig
from ssl_vit.losses.anchors import feature_loss, gram_loss, l2sp_loss
from ssl_vit.methods.step_result import StudentOutput
from ssl_vit.models.backbone import Backbone


class Anchor(nn.Module):
    """Frozen start backbone, and the loss between it and the student."""

    def __init__(self, config: AnchorConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone.requires_grad_(False).eval()

    @property
    def compares_tokens(self) -> bool:
        """Whether the start backbone computes the views, too."""
        return self.config.name != "l2sp"

    def forward(self, student: Backbone, output: StudentOutput) -> Tensor:
        """Compute the loss, 0 at the start of the run."""
        if not self.compares_tokens:
            pairs = zip(student.parameters(), self.backbone.parameters(), strict=True)
            trained = [(ours, start) for ours, start in pairs if ours.requires_grad]
            return l2sp_loss(*zip(*trained, strict=True))
        with torch.no_grad():
            start = self.backbone(output.images)
        if self.config.name == "gram":
            return gram_loss(output.tokens.patches, start.patches)
        return feature_loss(output.tokens.cls, output.tokens.patches, start.cls, start.patches)
