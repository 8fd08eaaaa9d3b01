"""Files of `ssl-vit attention`: maps, masks and overlays under the names of the images, and the IoU curve."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ssl_vit.data.sources.path_lists import check_name_inside
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, MethodResult
from ssl_vit.models.attention_maps import upsample_mask
from ssl_vit.visualization.overlays import OverlayInputs, head_figure, overlay

RULE_COLORS = {"oracle head": "#8a5a00", "fixed head": "#0057a8", "mean": "#b3003c"}


class SegmentationWriter:
    """Writer of the files of one image at a time.

    `maps/` holds NumPy arrays; `masks/mean/`, `masks/head0/`, ... (attention), `masks/lost/`, ... (other methods) and
    `masks/lost+guided/`, ... (refined) hold masks (0 or 255, of the images' sizes); `overlays/` shows the mean of the
    heads, or else the first method, over each image at its size, `heads/` all maps side by side.

    Args:
        directory: Created if missing; files of the same names are replaced.
        names: Relative names of all images; two that differ only in their suffix keep it in their files' names.
    """

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.directory = directory
        for name in names:
            check_name_inside(name, directory)
        stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
        shared = {stem for stem, count in Counter(stems).items() if count > 1}
        self.stems = [name if stem in shared else stem for name, stem in zip(names, stems, strict=True)]

    def write(self, index: int, inputs: OverlayInputs) -> None:
        """Write the files of the image with this index in `names`.

        Its arrays are `size`; with attention `maps` (heads + 1, rows, columns), the heads, then their mean, each of sum
        1, and their `masks`; for each method `<method>/mask` and `<method>/score_map` (rows, columns), of refined
        methods only the mask (H, W).
        """
        size = (inputs.image.shape[-2], inputs.image.shape[-1])
        arrays: dict[str, Any] = {"size": np.array(size)}
        if len(inputs.maps):
            arrays |= {"maps": inputs.maps.numpy(), "masks": inputs.masks.numpy()}
        for method, found in inputs.methods.items():
            arrays[f"{method}/mask"] = found.mask.numpy()
            if found.score_map.shape != size:
                arrays[f"{method}/score_map"] = found.score_map.numpy()
        np.savez_compressed(self._path("maps", index, ".npz"), **arrays)
        for head, mask in enumerate(inputs.masks):
            self._write_mask("mean" if head == len(inputs.masks) - 1 else f"head{head}", index, mask, size)
        for method, found in inputs.methods.items():
            self._write_mask(method, index, found.mask, size)
        overlay(inputs).save(self._path("overlays", index, ".jpg"), quality=90, subsampling=0)
        head_figure(inputs).save(self._path("heads", index, ".jpg"), quality=90, subsampling=0)

    def load(self, index: int) -> PredictedMasks:
        """Load the maps and masks of an image; refined score maps are not stored and are replaced by their masks."""
        with np.load(self._path("maps", index, ".npz")) as arrays:
            values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        maps = values["maps"][:-1] if "maps" in values else None
        masks = {name.removesuffix("/mask"): mask for name, mask in values.items() if name.endswith("/mask")}
        methods = {
            name: Segmentation(values.get(f"{name}/score_map", mask.float()), mask) for name, mask in masks.items()
        }
        return PredictedMasks(maps, methods)

    def _write_mask(self, name: str, index: int, mask: Tensor, size: tuple[int, int]) -> None:
        Image.fromarray(upsample_mask(mask, size).numpy()).save(self._path(f"masks/{name}", index, ".png"))

    def _path(self, kind: str, index: int, suffix: str) -> Path:
        path = self.directory / kind / f"{self.stems[index]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def plot_iou_curves(path: Path, results: list[MethodResult], attention_mass: float) -> None:
    """Plot the IoU by attention mass of the model (solid) and its random-init model (dashed), and the center prior.

    A line marks `attention_mass`, that of the masks. No PNG file is written if no result has attention.
    """
    curves = {result.name: result.details["IoU by mass"] for result in results if "IoU by mass" in result.details}
    if not curves:
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for model, curve in curves.items():
        for rule, color in RULE_COLORS.items():
            if rule in curve:
                style = "-" if model == MODEL else "--"
                axes.plot(curve["mass"], curve[rule], style, color=color, label=f"{rule}, {model}", linewidth=1.6)
    for result in results:
        if result.name == "center prior":
            level = result.ious["IoU"].mean().item()
            axes.axhline(level, color="#555555", linestyle=":", label="center prior")
    axes.axvline(attention_mass, color="#cccccc", linewidth=1, zorder=0)
    axes.set(xlabel="share of the attention inside the mask", ylabel="mean IoU", xlim=(0, 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=130)
