"""Configuration classes: every key with its type and range. Defaults and units are in `conf/`."""
