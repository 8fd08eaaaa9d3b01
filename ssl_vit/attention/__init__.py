"""What the [CLS] token looks at: maps, masks, scores, pictures."""
