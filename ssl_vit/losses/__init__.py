"""The formulas: tensors in, numbers out."""
