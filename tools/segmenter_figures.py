"""Measure the methods that find an object without labels: seconds, memory, and IoU on pictures with masks.

    python tools/segmenter_figures.py time
    python tools/segmenter_figures.py iou CHECKPOINT images masks [max_side]

`time`: processor seconds of one picture, one thread, on keys of two kinds of patches with noise (six heads of 64, 30 %
of the pairs joined), median of three; beside them the dense generalised eigensolution that TokenCut's authors use. Each
in a process of its own, for its peak memory above that of the keys.

`iou`: mean IoU, and its 95 % interval over pictures, of the network and of one with random weights, at the pictures'
own sizes; of the masks, and of the masks refined. The sign that pca is given is chosen by no mask.
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

from ssl_vit.attention.maps import Sight
from ssl_vit.attention.masks import to_pixels
from ssl_vit.attention.metrics import centre_prior, outline
from ssl_vit.attention.refine import refine
from ssl_vit.attention.segmentation import concatenated_keys
from ssl_vit.attention.segmenters import METHODS, make_segmenters
from ssl_vit.attention.stream import Attended, attend
from ssl_vit.attention.truth import MaskFolder
from ssl_vit.data.files import pictures_at
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.models.weights import load_backbone, random_twin

GRIDS = {450: (18, 25), 900: (30, 30), 3600: (60, 60), 7500: (75, 100)}
DENSE = "dense eigh"


def main() -> None:
    """One of the two tables, or, in a process of its own, one of the measurements."""
    torch.set_num_threads(1)
    if sys.argv[1] == "time":
        times()
    elif sys.argv[1] == "one":
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        scores(*sys.argv[2:])


def times() -> None:
    """A row per method, a column per number of patches."""
    print("seconds (MB)".ljust(14) + "".join(f"{count:>20}" for count in GRIDS))
    for name in (*METHODS, DENSE):
        cells = [
            subprocess.run([sys.executable, __file__, "one", name, str(count)], capture_output=True, check=True).stdout
            for count in GRIDS
        ]
        print(name.ljust(14) + "".join(f"{cell.decode().strip():>20}" for cell in cells), flush=True)


def measure(name: str, count: int) -> None:
    """Seconds and megabytes of one method at one number of patches."""
    sight = synthetic(GRIDS[count])
    small = synthetic((8, 8))
    method = dense if name == DENSE else make_segmenters([name], [sight])[name]
    method(small)  # libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(1 if name == DENSE else 3):
        start = time.process_time()
        method(sight)
        seconds.append(time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{median(seconds):.4f} ({grown:.0f})")


def synthetic(grid: tuple[int, int]) -> Sight:
    """A picture with an object in its middle."""
    random = torch.Generator().manual_seed(0)
    rows, columns = grid
    inside = torch.zeros(grid)
    inside[rows // 4 : rows * 3 // 4, columns // 4 : columns * 3 // 4] = 1
    kinds = torch.randn(2, 6, 64, generator=random)
    keys = kinds[inside.long()].permute(2, 0, 1, 3) + 2 * torch.randn(6, *grid, 64, generator=random)
    attention = torch.rand(6, *grid, generator=random)
    return Sight(attention / attention.sum((1, 2), keepdim=True), keys, keys.permute(1, 2, 0, 3).flatten(2))


def dense(sight: Sight) -> None:
    """TokenCut's eigenvector by the dense solver."""
    unit = torch.nn.functional.normalize(concatenated_keys(sight), dim=-1)
    weights = np.where((unit @ unit.T).numpy() > 0.2, 1.0, 1e-5)
    degrees = np.diag(weights.sum(1))
    eigh(degrees - weights, degrees, subset_by_index=[1, 2])


def scores(checkpoint: str, images: str, masks: str, max_side: str = "") -> None:
    """A row per method and network; two passes over the pictures, as pca needs them."""
    network = load_backbone(checkpoint, cls_needed=False)
    networks = [network, random_twin(network, 0)]
    pictures, truths = pictures_at(Path(images)), MaskFolder(Path(masks))
    skipped = SkippedPictures(Path("skipped.txt"))
    places = range(len(pictures))
    side = int(max_side) if max_side else None
    names = METHODS if network.backbone.has_cls else tuple(name for name in METHODS if name != "found")

    def stream() -> Iterator[Attended]:
        return attend(pictures, places, networks=networks, max_side=side, skipped=skipped)

    segmenters = [make_segmenters(names, (seen.sights[index] for seen in stream())) for index in range(2)]
    found: dict[tuple[str, str], list[Tensor]] = {}
    outlines = []
    for seen in stream():
        size = (seen.picture.shape[-2], seen.picture.shape[-1])
        truth = truths.read(pictures.name(seen.place), size)
        outlines.append(outline(truth))
        for title, methods, sight in zip(("network", "random"), segmenters, seen.sights, strict=True):
            for name, segment in methods.items():
                mask = segment(sight).mask
                for way, pixels in (("", to_pixels(mask, size)), (" refined", refine(mask, seen.picture))):
                    union = (pixels | truth).sum().clamp_min(1)
                    found.setdefault((name + way, title), []).append((pixels & truth).sum() / union)
    prior, _ = centre_prior(torch.stack(outlines))
    print(f"{len(outlines)} pictures, centre prior {cell(list(prior))}")
    for name in dict.fromkeys(name for name, _ in found):
        print(f"{name:<20}" + "".join(f"{title:>10} {cell(found[name, title])}" for title in ("network", "random")))


def cell(values: list[Tensor]) -> str:
    """A mean with its 95 % interval."""
    ious = torch.stack(values)
    return f"{ious.mean():.3f} ± {1.96 * ious.std() / len(ious) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
