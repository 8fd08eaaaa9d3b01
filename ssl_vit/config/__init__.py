"""Configuration classes: every key, its type, range and unit."""
