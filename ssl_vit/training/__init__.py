"""Trainer, run directory, checkpoints, loggers."""
