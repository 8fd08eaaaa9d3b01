"""Video object segmentation by label propagation."""
