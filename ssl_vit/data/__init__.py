"""Finding, decoding, indexing and loading pictures."""
