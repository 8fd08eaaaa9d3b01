"""Benchmark `ssl-vit attention`: exactness, share of a forward pass, images per second, peak memory.

    python tools/bench_attention_maps.py FOLDER [CHECKPOINT=random:vit_small_patch16_224] [ROUNDS=9]
    python tools/bench_attention_maps.py memory FOLDER [CHECKPOINT=random:vit_tiny_patch16_224] [OVERRIDES]

FOLDER holds real images. Exactness: the largest difference of any block's [CLS] row to the softmax that timm computes
without fused attention. Cost: processor time of a forward pass that captures the [CLS] rows of all blocks, over that
of a plain one, alternating pass by pass; the median of the rounds' ratios. Images per second of processor time:
`extract_last_block`, and with it each method. Memory: peak of the whole command, with masks, over 100 and over 1,000
images (the folder's, linked as often as needed; a box in the middle is the mask), in a process of its own each.
OVERRIDES are those of `ssl-vit attention`, such as methods=[attention,lost,tokencut,pca,found] refine=guided
max_side=112.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_vit.data.sources.image_folder import ImageFolder, scan_image_folder
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, build_segmenters
from ssl_vit.models.attention_maps import cls_attention, extract_last_block
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import load_backbone

SIDE = 480  # pixels
BATCH = 4


def main() -> None:
    """Run one of the two benchmarks."""
    torch.set_num_threads(1)
    args = sys.argv[1:]
    if args[0] == "memory":
        memory(Path(args[1]), args[2] if len(args) > 2 else "random:vit_tiny_patch16_224", args[3:])
        return
    checkpoint = args[1] if len(args) > 1 else "random:vit_small_patch16_224"
    rounds = int(args[2]) if len(args) > 2 else 9
    backbone = load_backbone(checkpoint).backbone
    images = read(scan_image_folder(Path(args[0])), SIDE)
    print(f"{checkpoint}, {BATCH} images of {SIDE} pixels, {torch.get_num_threads()} thread")
    print(f"largest difference to unfused attention, all blocks: {difference(backbone, images[:1]):.1e}")
    for side in (224, SIDE):
        cost(backbone, F.interpolate(images, (side, side), mode="bilinear", antialias=True), rounds)
    rates(backbone, images)


def read(dataset: ImageFolder, side: int) -> Tensor:
    """Read the first images, resized to a square and roughly normalized (B, 3, side, side)."""
    resized = [
        F.interpolate(dataset.read(index, 3)[None].float(), (side, side), mode="bilinear", antialias=True)
        for index in range(BATCH)
    ]
    return (torch.cat(resized) / 255 - 0.45) / 0.25


@torch.no_grad()
def difference(backbone: Backbone, images: Tensor) -> float:
    """Compute the largest absolute difference of any [CLS] row, scaled to sum 1 over the patches, to timm's softmax."""
    blocks = range(backbone.num_blocks)
    ours = cls_attention(backbone, images, blocks=blocks).flatten(3)  # (blocks, B, heads, N)
    seen: list[Tensor] = []
    handles = [
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0][:, :, 0]))
        for block in backbone.vit.blocks
    ]
    for block in backbone.vit.blocks:
        block.attn.fused_attn = False
    backbone.tokens(images)
    for block in backbone.vit.blocks:
        block.attn.fused_attn = True
    for handle in handles:
        handle.remove()
    theirs = torch.stack(seen)[..., backbone.num_prefix_tokens :]
    return (ours - theirs / theirs.sum(-1, keepdim=True)).abs().max().item()


@torch.no_grad()
def cost(backbone: Backbone, images: Tensor, rounds: int) -> None:
    """Print the ratios of a pass with all blocks' [CLS] rows to a plain one, in pairs of alternating order."""
    passes: dict[str, Callable[[], object]] = {
        "plain": lambda: backbone.tokens(images),
        "rows": lambda: cls_attention(backbone, images, blocks=range(backbone.num_blocks)),
    }
    for run in passes.values():
        run()
    ratios, plain = [], []
    for number in range(rounds):
        spent = {}
        for name in list(passes) if number % 2 else reversed(passes):
            start = time.process_time()
            passes[name]()
            spent[name] = time.process_time() - start
        ratios.append(spent["rows"] / spent["plain"])
        plain.append(spent["plain"])
    low, middle, high = min(ratios), median(ratios), max(ratios)
    print(
        f"{images.shape[-1]} pixels: all blocks' [CLS] rows take {middle:.3f} (of {rounds}: {low:.3f} to {high:.3f}) "
        f"of a plain forward pass, which takes {median(plain) / len(images):.3f} s an image"
    )


@torch.no_grad()
def rates(backbone: Backbone, images: Tensor) -> None:
    """Print images per second of processor time of the attention maps, and with each method."""
    start = time.process_time()
    images_features = extract_last_block(backbone, images)
    extraction = (time.process_time() - start) / len(images)
    print(f"{SIDE} pixels: {1 / extraction:.2f} images/s, forward pass and attention maps")
    for name, segment in build_segmenters(METHODS, images_features).items():
        start = time.process_time()
        for features in images_features:
            segment(features)
        spent = (time.process_time() - start) / len(images)
        print(f"  {name}: {spent * 1000:.0f} ms more an image, {1 / (extraction + spent):.2f} images/s")


def memory(folder: Path, checkpoint: str, overrides: list[str]) -> None:
    """Print the peak resident memory of the command for few and for many images."""
    dataset = scan_image_folder(folder)
    for count in (100, 1000):
        with tempfile.TemporaryDirectory() as folder_name:
            root = Path(folder_name)
            (root / "images").mkdir()
            (root / "masks").mkdir()
            for number, index in enumerate(islice(cycle(range(len(dataset))), count)):
                (root / "images" / f"{number}.jpg").symlink_to(dataset.path(index).resolve())
                _, height, width = dataset.read(index, 1).shape
                mask = Image.new("L", (width, height))
                mask.paste(255, (width // 4, height // 4, width // 2, height // 2))
                mask.save(root / "masks" / f"{number}.png")
            args = [
                f"checkpoint={checkpoint}",
                f"images={root / 'images'}",
                f"masks={root / 'masks'}",
                f"out={root}/o",
                *([] if any(word.startswith("max_side=") for word in overrides) else ["max_side=224"]),
            ]
            process = subprocess.Popen(
                [sys.executable, "-m", "ssl_vit", "attention", *args, *overrides],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            print(f"{count} images: exit {status}, peak {usage.ru_maxrss / 1024:.0f} MiB, {usage.ru_utime:.0f} s")


if __name__ == "__main__":
    main()
