"""Looking inside a vision transformer: its attention, its weights, its features, and what it is fed with."""
