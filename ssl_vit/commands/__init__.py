"""One file per command, each read top to bottom: config, parts, run."""
