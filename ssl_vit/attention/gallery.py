"""The folder that `ssl-vit attention` fills: maps, masks and drawings under the pictures' own names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.attention.masks import to_pixels
from ssl_vit.attention.pictures import Example, head_figure, overlay


class Gallery:
    """Writes one picture's files at a time.

    `maps/` holds NumPy arrays, `masks/mean/`, `masks/head0/`, ... are folders of masks (0 or 255, the pictures' sizes),
    `overlays/` shows the heads' mean over each picture at its size, `heads/` all heads side by side.

    Args:
        folder: Made where it is missing; files of the same names are replaced.
        names: Relative names of all pictures; two that differ in their suffix alone keep it in their files' names.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
        shared = {stem for stem, count in Counter(stems).items() if count > 1}
        self.stems = [name if stem in shared else stem for name, stem in zip(names, stems, strict=True)]

    def write(self, index: int, example: Example) -> None:
        """Write the files of the picture with this place in `names`."""
        size = (example.picture.shape[-2], example.picture.shape[-1])
        np.savez_compressed(
            self._place("maps", index, ".npz"),
            maps=example.maps.numpy(),  # (heads + 1, rows, columns): the heads, then their mean; each sums to 1
            masks=example.masks.numpy(),
            size=np.array(size),  # height and width of the picture
        )
        for head, mask in enumerate(to_pixels(example.masks, size)):
            name = "mean" if head == len(example.masks) - 1 else f"head{head}"
            Image.fromarray(mask.numpy()).save(self._place(f"masks/{name}", index, ".png"))
        overlay(example).save(self._place("overlays", index, ".jpg"), quality=90, subsampling=0)
        head_figure(example).save(self._place("heads", index, ".jpg"), quality=90, subsampling=0)

    def maps(self, index: int) -> Tensor:
        """The maps (heads, rows, columns) that were written for a picture."""
        with np.load(self._place("maps", index, ".npz")) as arrays:
            return torch.from_numpy(arrays["maps"][:-1])

    def _place(self, kind: str, index: int, suffix: str) -> Path:
        path = self.folder / kind / f"{self.stems[index]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
