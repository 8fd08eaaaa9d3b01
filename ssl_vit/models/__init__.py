"""Backbones on timm: their attention, checkpoints in and out, EMA, drop path."""
