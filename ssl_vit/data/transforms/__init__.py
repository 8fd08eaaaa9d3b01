"""Crops, color augmentation, corruption, resizing."""
