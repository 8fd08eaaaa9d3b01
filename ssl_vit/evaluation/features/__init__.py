"""Feature extraction and the feature cache."""
