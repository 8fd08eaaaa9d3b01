"""The folder that `ssl-vit attention` fills: maps, masks and drawings under the pictures' own names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.attention.masks import to_pixels
from ssl_vit.attention.pictures import Example, head_figure, overlay
from ssl_vit.attention.scoring import Objects
from ssl_vit.attention.segmentation import Segmentation


class Gallery:
    """Writes one picture's files at a time.

    `maps/` holds NumPy arrays; `masks/mean/`, `masks/head0/`, ... (attention), `masks/lost/`, ... (other methods) and
    `masks/lost+guided/`, ... (refined) are folders of masks (0 or 255, the pictures' sizes); `overlays/` shows the
    heads' mean, or else the first method, over each picture at its size, `heads/` everything side by side.

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
        """Write the files of the picture with this place in `names`.

        Its arrays are `size`; with attention `maps` (heads + 1, rows, columns), the heads, then their mean, each of sum
        1, and their `masks`; for each method `<method>/mask` and `<method>/soft` (rows, columns), of refined ones the
        mask alone (H, W).
        """
        size = (example.picture.shape[-2], example.picture.shape[-1])
        arrays: dict[str, Any] = {"size": np.array(size)}
        if len(example.maps):
            arrays |= {"maps": example.maps.numpy(), "masks": example.masks.numpy()}
        for method, found in example.methods.items():
            arrays[f"{method}/mask"] = found.mask.numpy()
            if found.soft.shape != size:
                arrays[f"{method}/soft"] = found.soft.numpy()
        np.savez_compressed(self._place("maps", index, ".npz"), **arrays)
        for head, mask in enumerate(example.masks):
            self._write_mask("mean" if head == len(example.masks) - 1 else f"head{head}", index, mask, size)
        for method, found in example.methods.items():
            self._write_mask(method, index, found.mask, size)
        overlay(example).save(self._place("overlays", index, ".jpg"), quality=90, subsampling=0)
        head_figure(example).save(self._place("heads", index, ".jpg"), quality=90, subsampling=0)

    def objects(self, index: int) -> Objects:
        """What was written for a picture; refined soft maps are not kept, their masks stand for them."""
        with np.load(self._place("maps", index, ".npz")) as arrays:
            values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        maps = values["maps"][:-1] if "maps" in values else None
        masks = {name.removesuffix("/mask"): mask for name, mask in values.items() if name.endswith("/mask")}
        methods = {name: Segmentation(values.get(f"{name}/soft", mask.float()), mask) for name, mask in masks.items()}
        return Objects(maps, methods)

    def _write_mask(self, name: str, index: int, mask: Tensor, size: tuple[int, int]) -> None:
        Image.fromarray(to_pixels(mask, size).numpy()).save(self._place(f"masks/{name}", index, ".png"))

    def _place(self, kind: str, index: int, suffix: str) -> Path:
        path = self.folder / kind / f"{self.stems[index]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
