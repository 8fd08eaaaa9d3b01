"""Figures: image grids, overlays, views."""
