"""Feature extraction, cached on disk."""
