"""Result of an analysis: figures, arrays and statistics, and the directory that `ssl-vit inspect` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.evaluation.results.eval_result import json_safe
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, RANDOM
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.visualization.analysis.activation_collector import ActivationCollector, Activations
from ssl_vit.visualization.analysis.attention_figures import draw_head_statistic, rollout_figure
from ssl_vit.visualization.analysis.attention_statistics import uniform_distance
from ssl_vit.visualization.analysis.cka import MIN_IMAGES, comparison_figure, layers_figure
from ssl_vit.visualization.analysis.feature_figures import (
    OUTLIER,
    block_of_largest_norm,
    norms_figure,
    spectrum,
    spectrum_figure,
)
from ssl_vit.visualization.analysis.weight_figures import (
    filter_components,
    filter_figure,
    position_figure,
    position_similarity,
)
from ssl_vit.visualization.image_grid import TitledFigure

INSPECT_JSON = "inspect.json"
PROTOCOL = {
    "images": "random subset; short side resized to image_size (bicubic, antialias); center crop",
    "attention": "softmax over all tokens in float32; rows of the patch queries; columns of the patches, sum 1",
    "distance": "mean over the patches i of sum_j A_ij |p_i - p_j| in pixels; per head, then the mean over the images",
    "entropy": "-sum_j A_ij ln A_ij over ln N, mean over the N patches",
    "prefix": "attention of the patches on class token and registers, before these are removed",
    "diversity": "1 - mean cosine of a head's patch-by-patch attention to that of the block's other heads, per image",
    "rollout": "product over the blocks of (mean of the heads + identity) / 2; row of the class token, patches, sum 1",
    "layers": "linear CKA of the mean patch tokens after each block; HSIC unbiased, mean over minibatches of 256",
    "norms": "of the patch tokens after each block, before the final norm; levels are quantiles .05 .5 .95 1 per image",
    "spectrum": "singular values of the features after the final norm, not centered; effective rank is RankMe",
    "filters": "principal components of the patch embedding's filters, mean subtracted",
    "positions": "cosines of the patches' position embeddings; (rows, columns, rows, columns)",
}


@dataclass
class AnalysisResult:
    """Figures, arrays and statistics, in the order of the analyses."""

    figures: dict[str, TitledFigure] = field(default_factory=dict)  # by file name without suffix
    arrays: dict[str, Tensor] = field(default_factory=dict)  # by name in arrays.npz
    statistics: dict[str, Any] = field(default_factory=dict)  # plain containers for inspect.json, by figure
    skipped: dict[str, str] = field(default_factory=dict)  # reason for each figure that is not drawn

    def write(self, directory: Path, metadata: dict[str, Any]) -> None:
        """Write figures as PNG, `arrays.npz`, and at last `inspect.json`, which lists the files, with the metadata."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / INSPECT_JSON).unlink(missing_ok=True)  # it would not describe the new files
        for name, figure in self.figures.items():
            with atomic_write(directory / f"{name}.png") as file:
                figure.image.save(file, format="PNG")
        arrays: dict[str, Any] = {name: values.numpy() for name, values in self.arrays.items()}
        with atomic_write(directory / "arrays.npz") as file:
            np.savez_compressed(file, **arrays)
        content = {
            "schema": 1,
            "figures": [
                {"file": f"{name}.png", "title": title, "text": text} for name, (title, _, text) in self.figures.items()
            ],
            "skipped": self.skipped,
            "statistics": json_safe(self.statistics),
            "protocol": PROTOCOL,
            "arrays": {name: list(values.shape) for name, values in self.arrays.items()},
        }
        write_json(directory / INSPECT_JSON, content | metadata)


def is_analysis(path: Path) -> bool:
    """Return whether a file is an `inspect.json`."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"figures", "protocol", "arrays"} <= content.keys()


def analyze_weights(result: AnalysisResult, models: dict[str, LoadedBackbone]) -> None:
    """Add position embeddings and patch filters, for which no images are needed."""
    similarity = position_similarity(models[MODEL].backbone)
    if similarity is None:
        result.skipped["positions"] = "the model has no learned position embeddings"
    else:
        result.figures["positions"] = position_figure(similarity)
        result.arrays[f"{MODEL}/positions"] = similarity
    components = {name: filter_components(loaded.backbone.patch_filters()) for name, loaded in models.items()}
    result.figures["filters"] = filter_figure(components)
    result.statistics["filters"] = {"explained_by_shown": {}}
    for name, (filters, explained) in components.items():
        result.arrays.update({f"{name}/filters": filters, f"{name}/filters explained": explained})
        result.statistics["filters"]["explained_by_shown"][name] = float(explained[: len(filters)].sum())


def analyze_attention(
    result: AnalysisResult, collector: ActivationCollector, activations: dict[str, Activations]
) -> None:
    """Add the attention of the heads of each model, and attention rollout; the collector is that of the model."""
    backbone, examples = collector.backbone, activations[MODEL].examples
    if backbone.has_cls:
        random = activations[RANDOM].examples if RANDOM in activations else []
        result.figures["rollout"] = rollout_figure(examples, random)
    else:
        result.skipped["rollout"] = "the model has no class token that it pools"
    heads = {name: found.heads for name, found in activations.items()}
    statistics = {
        "distance": {name: part.distance.mean(0) for name, part in heads.items()},  # (blocks, heads)
        "entropy": {name: part.entropy.mean(0) for name, part in heads.items()},
    }
    if backbone.num_prefix_tokens:
        by_token = {name: part.prefix.mean(0) for name, part in heads.items()}  # (blocks, heads, prefix)
        statistics["prefix"] = {name: values.sum(-1) for name, values in by_token.items()}
        result.arrays.update({f"{name}/prefix by token": values for name, values in by_token.items()})
    else:
        result.skipped["prefix"] = "the model has neither class token nor registers"
    if backbone.num_heads > 1:
        statistics["diversity"] = {name: part.diversity.mean(0) for name, part in heads.items()}
    else:
        result.skipped["diversity"] = "the model has a single head"
    for kind, values in statistics.items():
        result.figures[kind] = draw_head_statistic(kind, values, collector, len(activations[MODEL].features))
        result.arrays.update({f"{name}/{kind}": part for name, part in values.items()})
        result.statistics[kind] = {name: part.mean(1).tolist() for name, part in values.items()}  # per block
    result.statistics["distance"]["uniform"] = uniform_distance(collector.centers)


def analyze_features(
    result: AnalysisResult, collector: ActivationCollector, activations: dict[str, Activations]
) -> None:
    """Add the norms of the tokens and the spectrum of the features; arguments as of `analyze_attention`."""
    norms = {name: found.norms for name, found in activations.items()}
    block = block_of_largest_norm(norms[MODEL])
    maps = [(example.crop, example.norms[block]) for example in activations[MODEL].examples]
    result.figures["norms"] = norms_figure(norms, maps, block)
    result.statistics["norms"] = {name: part.outliers.mean(0).tolist() for name, part in norms.items()}
    result.statistics["norms"]["outlier"] = (
        f"share of tokens over {OUTLIER:g} times the median of their image, per block"
    )
    for name, (levels, outliers) in norms.items():
        result.arrays.update({f"{name}/norm levels": levels.mean(0), f"{name}/norm outliers": outliers.mean(0)})
    spectra = {name: spectrum(part.features) for name, part in activations.items()}
    features = "[CLS] tokens" if collector.backbone.has_cls else "mean patch tokens"
    num_images = len(activations[MODEL].features)
    result.figures["spectrum"] = spectrum_figure(spectra, features=features, num_images=num_images)
    result.statistics["spectrum"] = {name: {"effective_rank": part.rank} for name, part in spectra.items()}
    result.statistics["spectrum"]["features"] = features
    result.arrays.update({f"{name}/spectrum": part.shares for name, part in spectra.items()})


def analyze_layers(
    result: AnalysisResult, cka: Tensor | None, num_blocks: dict[str, int], other: str | None, num_images: int
) -> None:
    """Add the similarity of layers: (layers, layers) of those of all models, one model after the other.

    It is None for too few images; `num_blocks` is by model, in that order; `other` is the model of `compare_to`.
    """
    if cka is None:
        reason = f"{num_images} images: CKA needs at least {MIN_IMAGES}"
        result.skipped.update(dict.fromkeys(["layers", *(["comparison"] if other else [])], reason))
        return
    blocks = torch.split(cka[: num_blocks[MODEL]], list(num_blocks.values()), dim=1)
    similarity = dict(zip(num_blocks, blocks, strict=True))
    result.figures["layers"] = layers_figure(similarity[MODEL], similarity.get(RANDOM), num_images)
    if other:
        result.figures["comparison"] = comparison_figure(similarity[other], other, num_images)
    result.arrays.update({f"{MODEL}/cka with {name}": part for name, part in similarity.items()})
