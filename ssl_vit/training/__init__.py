"""Schedules, checkpoints, health and progress of a run."""
