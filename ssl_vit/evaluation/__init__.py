"""Evaluation of frozen features and attention."""
