"""Benchmark the segmentation methods without labels: seconds, memory, and IoU on images with masks.

    python tools/bench_segmentation.py time
    python tools/bench_segmentation.py iou CHECKPOINT images masks [max_side]

`time`: processor seconds of one image, one thread, on keys of two kinds of patches with noise (six heads of 64, 30 %
of the pairs joined), median of three; beside them the dense generalized eigensolution that TokenCut's authors use. Each
in a process of its own, for its peak memory above that of the keys.

`iou`: mean IoU, and its 95 % interval over images, of the model and of one with random weights, at the images'
own sizes; of the masks, and of the refined masks. The sign of pca's component is chosen without masks.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from ssl_vit.data.annotations.object_masks import MaskFolder
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import load_images_at
from ssl_vit.evaluation.segmentation.guided_filter import refine
from ssl_vit.evaluation.segmentation.image_outputs import ImageOutputs, run_backbone
from ssl_vit.evaluation.segmentation.iou import center_prior, downsample_mask
from ssl_vit.evaluation.segmentation.mask_methods import METHODS, build_segmenters
from ssl_vit.evaluation.segmentation.patch_mask import concatenated_keys
from ssl_vit.models.attention_maps import LastBlockFeatures, upsample_mask
from ssl_vit.models.checkpoint import load_backbone, random_init_like
from ssl_vit.runtime.text import format_table

GRIDS = {450: (18, 25), 900: (30, 30), 3600: (60, 60), 7500: (75, 100)}
DENSE = "dense eigh"


def main() -> None:
    """Print one of the two tables or, in a process of its own, run one of the measurements."""
    torch.set_num_threads(1)
    if sys.argv[1] == "time":
        times()
    elif sys.argv[1] == "one":
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        scores(*sys.argv[2:])


def times() -> None:
    """Print a row per method and a column per number of patches."""
    rows = []
    for name in (*METHODS, DENSE):
        cells = [
            subprocess.run([sys.executable, __file__, "one", name, str(count)], capture_output=True, check=True).stdout
            for count in GRIDS
        ]
        rows.append([name, *(cell.decode().strip() for cell in cells)])
    print(format_table(rows, ["seconds (MB)", *map(str, GRIDS)]))


def measure(name: str, count: int) -> None:
    """Print seconds and megabytes of one method at one number of patches."""
    features = synthetic(GRIDS[count])
    small = synthetic((8, 8))
    method = dense if name == DENSE else build_segmenters([name], [features])[name]
    method(small)  # loads libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(1 if name == DENSE else 3):
        start = time.process_time()
        method(features)
        seconds.append(time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{median(seconds):.4f} ({grown:.0f})")


def synthetic(grid: tuple[int, int]) -> LastBlockFeatures:
    """Make features of an image with an object in its middle."""
    random = torch.Generator().manual_seed(0)
    rows, columns = grid
    inside = torch.zeros(grid)
    inside[rows // 4 : rows * 3 // 4, columns // 4 : columns * 3 // 4] = 1
    kinds = torch.randn(2, 6, 64, generator=random)
    keys = kinds[inside.long()].permute(2, 0, 1, 3) + 2 * torch.randn(6, *grid, 64, generator=random)
    attention = torch.rand(6, *grid, generator=random)
    return LastBlockFeatures(attention / attention.sum((1, 2), keepdim=True), keys, keys.permute(1, 2, 0, 3).flatten(2))


def dense(features: LastBlockFeatures) -> None:
    """Compute TokenCut's eigenvector by the dense solver."""
    unit = torch.nn.functional.normalize(concatenated_keys(features), dim=-1)
    weights = np.where((unit @ unit.T).numpy() > 0.2, 1.0, 1e-5)
    degrees = np.diag(weights.sum(1))
    eigh(degrees - weights, degrees, subset_by_index=[1, 2])


def scores(checkpoint: str, images: str, masks: str, max_side: str = "") -> None:
    """Print a row per method and model, from two passes over the images, which pca needs."""
    model = load_backbone(checkpoint, require_cls=False)
    models = [model, random_init_like(model, 0)]
    dataset, targets = load_images_at(Path(images)), MaskFolder(Path(masks))
    skipped = SkippedImageLog(Path("skipped_images.txt"))
    indices = range(len(dataset))
    side = int(max_side) if max_side else None
    names = METHODS if model.backbone.has_cls else tuple(name for name in METHODS if name != "found")

    def stream() -> Iterator[ImageOutputs]:
        return run_backbone(dataset, indices, models=models, max_side=side, skipped=skipped)

    segmenters = [build_segmenters(names, (outputs.features[index] for outputs in stream())) for index in range(2)]
    found: dict[tuple[str, str], list[Tensor]] = {}
    prior_masks = []
    for outputs in stream():
        size = (outputs.image.shape[-2], outputs.image.shape[-1])
        target = targets.read(dataset.name(outputs.image_index), size)
        prior_masks.append(downsample_mask(target))
        for title, methods, features in zip(("model", "random"), segmenters, outputs.features, strict=True):
            for name, segment in methods.items():
                mask = segment(features).mask
                for suffix, pixels in (("", upsample_mask(mask, size)), (" refined", refine(mask, outputs.image))):
                    union = (pixels | target).sum().clamp_min(1)
                    found.setdefault((name + suffix, title), []).append((pixels & target).sum() / union)
    prior, _ = center_prior(torch.stack(prior_masks))
    print(f"{len(prior_masks)} images, center prior {cell(list(prior))}")
    names = dict.fromkeys(name for name, _ in found)
    rows = [[name, *(cell(found[name, title]) for title in ("model", "random"))] for name in names]
    print(format_table(rows, ["IoU", "model", "random"]))


def cell(values: list[Tensor]) -> str:
    """Format a mean with its 95 % interval."""
    ious = torch.stack(values)
    return f"{ious.mean():.3f} ± {1.96 * ious.std() / len(ious) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
