"""Results and how they came about: written, read back, compared and drawn."""
