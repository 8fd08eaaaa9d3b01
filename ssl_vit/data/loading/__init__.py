"""Datasets, batch samplers and loaders of training and evaluation."""
