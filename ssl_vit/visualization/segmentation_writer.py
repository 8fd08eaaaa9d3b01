"""The folder that `ssl-vit attention` fills: maps, masks and drawings under the images' own names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, MethodResult
from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.visualization.overlays import OverlayInputs, head_figure, overlay


class SegmentationWriter:
    """Writes one image's files at a time.

    `maps/` holds NumPy arrays; `masks/mean/`, `masks/head0/`, ... (attention), `masks/lost/`, ... (other methods) and
    `masks/lost+guided/`, ... (refined) are folders of masks (0 or 255, the images' sizes); `overlays/` shows the
    heads' mean, or else the first method, over each image at its size, `heads/` everything side by side.

    Args:
        folder: Made where it is missing; files of the same names are replaced.
        names: Relative names of all images; two that differ in their suffix alone keep it in their files' names.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
        shared = {stem for stem, count in Counter(stems).items() if count > 1}
        self.stems = [name if stem in shared else stem for name, stem in zip(names, stems, strict=True)]

    def write(self, index: int, example: OverlayInputs) -> None:
        """Write the files of the image with this place in `names`.

        Its arrays are `size`; with attention `maps` (heads + 1, rows, columns), the heads, then their mean, each of sum
        1, and their `masks`; for each method `<method>/mask` and `<method>/soft` (rows, columns), of refined ones the
        mask alone (H, W).
        """
        size = (example.image.shape[-2], example.image.shape[-1])
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

    def load(self, index: int) -> PredictedMasks:
        """What was written for an image; refined soft maps are not kept, their masks stand for them."""
        with np.load(self._place("maps", index, ".npz")) as arrays:
            values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        maps = values["maps"][:-1] if "maps" in values else None
        masks = {name.removesuffix("/mask"): mask for name, mask in values.items() if name.endswith("/mask")}
        methods = {name: Segmentation(values.get(f"{name}/soft", mask.float()), mask) for name, mask in masks.items()}
        return PredictedMasks(maps, methods)

    def _write_mask(self, name: str, index: int, mask: Tensor, size: tuple[int, int]) -> None:
        Image.fromarray(upsample_mask(mask, size).numpy()).save(self._place(f"masks/{name}", index, ".png"))

    def _place(self, kind: str, index: int, suffix: str) -> Path:
        path = self.folder / kind / f"{self.stems[index]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


RULES = {"oracle head": "#8a5a00", "fixed head": "#0057a8", "mean": "#b3003c"}


def plot_iou_curves(path: Path, results: list[MethodResult], mass: float) -> None:
    """Each head rule of the model (solid) and of its random-init model (dashed), beside the center prior.

    Args:
        path: A PNG.
        results: Of which some may have no attention; then there is nothing to draw.
        mass: That the masks were made with.
    """
    curves = {result.name: result.details["IoU by mass"] for result in results if "IoU by mass" in result.details}
    if not curves:
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for model, curve in curves.items():
        for rule, color in RULES.items():
            if rule in curve:
                style = "-" if model == MODEL else "--"
                axes.plot(curve["mass"], curve[rule], style, color=color, label=f"{rule}, {model}", linewidth=1.6)
    for result in results:
        if result.name == "center prior":
            level = result.ious["IoU"].mean().item()
            axes.axhline(level, color="#555555", linestyle=":")
            axes.annotate(
                "center prior", (0.01, level), (0, 3), textcoords="offset points", fontsize=8, color="#555555"
            )
    axes.axvline(mass, color="#cccccc", linewidth=1, zorder=0)
    axes.set(xlabel="share of the attention that the mask holds", ylabel="mean IoU", xlim=(0, 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=130)
