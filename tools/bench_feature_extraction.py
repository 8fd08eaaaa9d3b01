"""Benchmark feature extraction on this CPU: forward passes of a whole batch against chunks that fit the cache.

    python tools/bench_feature_extraction.py

`extract` on images in memory (random, of the model's size), batches of 256 (64 at 224 pixels), bfloat16 where the
CPU supports it, one thread. All variants in turn, three rounds; a row has the median of images per second of CPU time,
the ratio to the first row, and the fraction of the FLOP/s of a product of two 2048 x 2048 bfloat16 matrices in the
same rounds.
FLOPs: 2 per multiply-add of the patch projection, the linear layers, and both products of the attention.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features import extractor as features
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone

MEAN, STD = [0.5] * 3, [0.25] * 3
ROUNDS = 3
VARIANTS = {  # tokens per pass, fused attention
    "whole batch, fused attention": (10**9, True),
    "whole batch, plain attention": (10**9, False),
    "fits the cache, fused": (features._TOKENS, True),
    "fits the cache, plain": (features._TOKENS, False),
}


def main() -> None:
    """Measure both models."""
    torch.set_num_threads(1)
    table("ViT-T/4 at 32 pixels", "vit_tiny_patch16_224", 32, 4, 512)
    table("ViT-S/16 at 224 pixels", "vit_small_patch16_224", 224, 16, 64)


def table(title: str, name: str, size: int, patch: int, count: int) -> None:
    """Print the rows of one model."""
    backbone = model(name, size, patch)
    loaded = LoadedBackbone(backbone, MEAN, STD, name, None, None)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    dataset = ArrayDataset(images, torch.zeros(count, dtype=torch.int64), ["one"], title="random")
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks = []
    for _ in range(ROUNDS):
        for variant, (tokens, fused) in VARIANTS.items():
            features._TOKENS = tokens
            backbone.set_fused_attention(fused)
            start = time.process_time()
            extractor = features.BackboneExtractor(loaded, EvalTransform(size, 1.0, MEAN, STD), blocks=1)
            skipped = SkippedImageLog(Path("none.txt"))
            features.extract(extractor, dataset, batch_size=256, num_workers=0, skipped=skipped, show=False)
            rates[variant].append(count / (time.process_time() - start))
        peaks.append(peak())
    first = median(rates[next(iter(VARIANTS))])
    print(f"{title}: {flops(backbone, size) / 1e9:.2f} GFLOP per image, product {median(peaks) / 1e9:.0f} GFLOP/s")
    for variant, values in rates.items():
        share = median(values) * flops(backbone, size) / median(peaks)
        print(
            f"  {variant:<30}{median(values):>8.1f} images/s{median(values) / first:>7.2f}x{share:>8.0%} of the product"
        )


def model(name: str, size: int, patch: int) -> Backbone:
    """Return a frozen model with random weights."""
    sizes = {"img_size": size, "patch_size": patch, "in_chans": 3, "reg_tokens": 0, "drop_path": 0.0}
    shared = {"embed_dim": None, "depth": None, "num_heads": None, "init": "timm"}
    return Backbone(BackboneConfig(name=name, **sizes, **shared)).requires_grad_(False).eval()


def flops(backbone: Backbone, size: int) -> float:
    """Count the FLOPs of one image's forward pass."""
    width, depth = backbone.embed_dim, backbone.num_blocks
    patches = (size // backbone.patch_size) ** 2
    tokens = patches + 1
    project = patches * 3 * backbone.patch_size**2 * width
    return 2 * (project + depth * (12 * tokens * width**2 + 2 * tokens**2 * width))


def peak() -> float:
    """Measure the FLOP/s of a product of two 2048 x 2048 bfloat16 matrices."""
    a = torch.randn(2048, 2048).bfloat16()
    start = time.process_time()
    for _ in range(5):
        torch.mm(a, a)
    return 5 * 2 * 2048**3 / (time.process_time() - start)


if __name__ == "__main__":
    main()
