"""The folder that `ssl-vit inspect` fills: panels as PNG, `arrays.npz`, and `inspect.json` that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.evaluation.results.eval_result import json_safe
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.visualization.analysis.analysis_result import AnalysisResult

INDEX = "inspect.json"
PROTOCOL = {
    "images": "chosen at random; short side to the model's image_size, bicubic, antialias; crop from the middle",
    "attention": "softmax over all tokens in float32; rows of the patches; of them only the patches' columns, sum 1",
    "distance": "mean over the patches i of sum_j A_ij |p_i - p_j| in pixels; per head, then the mean of the images",
    "entropy": "-sum_j A_ij ln A_ij over ln N, mean over the N patches",
    "prefix": "attention of the patches on class token and registers, before these are dropped",
    "diversity": "1 - mean cosine of a head's patch-by-patch attention to that of the block's other heads, per image",
    "rollout": "product over the blocks of (mean of the heads + identity) / 2; the class token's row, patches, sum 1",
    "layers": "linear CKA of the mean patch tokens behind each block; HSIC unbiased, mean over minibatches of 256",
    "norms": "of the patch tokens behind each block, not yet normalized; levels are quantiles .05 .5 .95 1 per image",
    "spectrum": "singular values of the features after the final norm, not centerd; effective rank is RankMe",
    "filters": "principal components of the patch embedding's filters, their mean taken off",
    "positions": "cosines of the patches' position embeddings; (rows, columns, rows, columns)",
}


def write_findings(folder: Path, found: AnalysisResult, about: dict[str, Any]) -> None:
    """Write everything; `inspect.json` comes last, so that whoever finds it finds the files that it names.

    Args:
        folder: Made where it is missing; files of the same names are replaced.
        found: At least one panel.
        about: What else `inspect.json` says: model, images, cost; plain containers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # the earlier one does not tell of what follows
    for name, panel in found.panels.items():
        with atomic_write(folder / f"{name}.png") as file:
            panel.image.save(file, format="PNG")
    arrays: dict[str, Any] = {name: values.numpy() for name, values in found.arrays.items()}
    with atomic_write(folder / "arrays.npz") as file:
        np.savez_compressed(file, **arrays)
    panels = [{"file": f"{name}.png", "title": panel.title, "text": panel.text} for name, panel in found.panels.items()]
    content = {
        "schema": 1,
        "panels": panels,
        "left_out": found.left_out,
        "measured": json_safe(found.numbers),
        "how": PROTOCOL,
        "arrays": {name: list(values.shape) for name, values in found.arrays.items()},
        **about,
    }
    write_json(folder / INDEX, content)
