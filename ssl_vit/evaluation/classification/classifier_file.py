"""Write a fitted linear classifier to a file of its own, so that it can be applied elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, LinearClassifier
from ssl_vit.evaluation.evaluator import Evaluation
from ssl_vit.runtime.atomic_io import atomic_write, write_json


def save_probe(
    evaluation: Evaluation, probe: LinearClassifier, variant: FeatureVariant, classes: Sequence[str]
) -> Path:
    """Write `<result>.probe.safetensors`, and beside it a JSON that documents how to apply it.

    Args:
        evaluation: Evaluation of the probe.
        probe: Classifier on the CPU.
        variant: Its features.
        classes: Names of the C classes, in the order of its scores.

    Returns:
        The weights file: mean and scale (D,), weight (D, C), bias (C,), float32.
    """
    path = evaluation.out.with_suffix(".probe.safetensors")
    with atomic_write(path) as file:
        file.write(save({name: part.contiguous() for name, part in probe._asdict().items()}))
    checkpoint = f"{evaluation.config.checkpoint!r}, {evaluation.config.weights!r}"
    patch_mean = " + [tokens[-1].patches.mean(dim=1)]" if variant.patch_mean else ""
    description = {
        "apply": [
            "import torch",
            "from safetensors.torch import load_file",
            "from ssl_vit.models.checkpoint import load_backbone",
            f"tokens = load_backbone({checkpoint}).backbone.get_intermediate_tokens(images, {variant.blocks})",
            f"x = torch.cat([block.cls for block in tokens]{patch_mean}, dim=1)",
            f"probe = load_file({path.name!r})",
            'scores = (x - probe["mean"]) * probe["scale"] @ probe["weight"] + probe["bias"]',
        ],
        "images": "float (B, channels, image_size, image_size), cropped and normalized as in `transform`",
        "transform": evaluation.transform.describe(),
        "features": str(variant),
        "classes": list(classes),
        "checkpoint": {"source": evaluation.loaded.source, "sha256": evaluation.loaded.sha256},
    }
    write_json(path.with_suffix(".json"), description)
    return path
