"""A fitted probe as a file of its own, so that the classifier that a record speaks of can be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from ssl_vit.evaluation.classification.linear_classifier import FeatureVariant, LinearClassifier
from ssl_vit.evaluation.evaluator import Evaluation
from ssl_vit.runtime.atomic_io import atomic_write, write_json


def save_probe(study: Evaluation, probe: LinearClassifier, variant: FeatureVariant, classes: Sequence[str]) -> Path:
    """Write `<record>.probe.safetensors`, and beside it a JSON that says how to apply it.

    Args:
        study: That the probe is of.
        probe: On the CPU.
        variant: The features that it sees.
        classes: Names of the C classes, in the order of its scores.

    Returns:
        The file of weights: mean and scale (D,), weight (D, C), bias (C,), float32.
    """
    path = study.out.with_suffix(".probe.safetensors")
    with atomic_write(path) as file:
        file.write(save({name: part.contiguous() for name, part in probe._asdict().items()}))
    checkpoint = f"{study.config.checkpoint!r}, {study.config.weights!r}"
    patch_mean = " + [tokens[-1].patches.mean(dim=1)]" if variant.patch_mean else ""
    about = {
        "apply": [
            "import torch",
            "from safetensors.torch import load_file",
            "from ssl_vit.models.checkpoint import load_backbone",
            f"tokens = load_backbone({checkpoint}).backbone.get_intermediate_tokens(images, {variant.blocks})",
            f"x = torch.cat([block.cls for block in tokens]{patch_mean}, dim=1)",
            f"probe = load_file({path.name!r})",
            'scores = (x - probe["mean"]) * probe["scale"] @ probe["weight"] + probe["bias"]',
        ],
        "images": "float (B, channels, image_size, image_size), cut and normalized as `transform` says",
        "transform": study.transform.describe(),
        "features": str(variant),
        "classes": list(classes),
        "checkpoint": {"source": study.loaded.source, "sha256": study.loaded.sha256},
    }
    write_json(path.with_suffix(".json"), about)
    return path
