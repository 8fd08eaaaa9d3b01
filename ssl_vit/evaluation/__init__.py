"""Frozen features, kNN, linear probe and their records."""
