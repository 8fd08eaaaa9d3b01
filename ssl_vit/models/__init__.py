"""The timm ViT backbone, the heads, the EMA teacher and their weights."""
