"""Analysis of a model: attention, weights, features."""
