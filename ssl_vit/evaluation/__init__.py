"""Frozen features, and what they are worth: kNN, linear probes, few labels, other data."""
