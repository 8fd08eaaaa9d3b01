"""Unsupervised object masks and their scores."""
