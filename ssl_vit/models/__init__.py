"""The timm backbone, its attention, checkpoints in and out."""
