"""Results: written, read, compared."""
