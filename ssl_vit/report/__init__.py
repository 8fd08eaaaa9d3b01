"""A run as one page that opens anywhere: what it reached, what it sees, and how all of it was computed."""
