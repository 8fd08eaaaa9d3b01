"""What an inspection found out: panels, the arrays that they are drawn from, and the numbers that sum them up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.evaluation.segmentation.segmentation_evaluator import MODEL, RANDOM
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.visualization.analysis.activation_collector import Observation, Observer
from ssl_vit.visualization.analysis.attention_rollout import Rolled, rollout_panel
from ssl_vit.visualization.analysis.cka import FEWEST, layers_panel, versus_panel
from ssl_vit.visualization.analysis.feature_spectrum import spectrum, spectrum_panel
from ssl_vit.visualization.analysis.head_figures import distance_panel, diversity_panel, entropy_panel, prefix_panel
from ssl_vit.visualization.analysis.head_statistics import uniform_distance
from ssl_vit.visualization.analysis.patch_filters import filter_components, filter_panel
from ssl_vit.visualization.analysis.position_embeddings import position_panel, position_similarity
from ssl_vit.visualization.analysis.token_norms import OUTLIER, NormMap, norms_panel, worst_block
from ssl_vit.visualization.image_grid import TitledFigure


class AnalysisResult(NamedTuple):
    """A part of an inspection; parts are put together in their order."""

    panels: dict[str, TitledFigure]  # by the name of their file, without suffix
    arrays: dict[str, Tensor]  # by their name in arrays.npz
    numbers: dict[str, Any]  # plain containers for inspect.json, by panel
    left_out: dict[str, str]  # why there is no panel of this name

    @classmethod
    def none(cls) -> AnalysisResult:
        """Nothing yet."""
        return cls({}, {}, {}, {})

    def add(self, other: AnalysisResult) -> None:
        """Take in what else was found."""
        self.panels.update(other.panels)
        self.arrays.update(other.arrays)
        self.numbers.update(other.numbers)
        self.left_out.update(other.left_out)


def analyze_weights(models: dict[str, LoadedBackbone]) -> AnalysisResult:
    """What needs no image: position embeddings and patch filters."""
    found = AnalysisResult.none()
    similarity = position_similarity(models[MODEL].backbone)
    if similarity is None:
        found.left_out["positions"] = "the model has no learned position embeddings"
    else:
        found.panels["positions"] = position_panel(similarity)
        found.arrays[f"{MODEL}/positions"] = similarity
    components = {name: filter_components(loaded.backbone.patch_filters()) for name, loaded in models.items()}
    found.panels["filters"] = filter_panel(components)
    for name, (filters, explained) in components.items():
        found.arrays.update({f"{name}/filters": filters, f"{name}/filters explained": explained})
    found.numbers["filters"] = {"explained_by_shown": {
        name: float(explained[: len(filters)].sum()) for name, (filters, explained) in components.items()
    }}  # fmt: skip
    return found


def analyze_attention(observers: dict[str, Observer], seen: dict[str, Observation]) -> AnalysisResult:
    """What the heads do, and the rollout."""
    found = AnalysisResult.none()
    uniform = uniform_distance(observers[MODEL].centers)
    backbone = observers[MODEL].backbone
    readings = {name: observation.heads for name, observation in seen.items()}
    dataset = len(seen[MODEL].features)
    if all(observation.drawn[0].rollout is not None for observation in seen.values()):
        found.panels["rollout"] = rollout_panel(_rolled(seen))
    else:
        found.left_out["rollout"] = "the model has no class token that it pools"
    distance = _means(readings, "distance")
    found.panels["distance"] = distance_panel(distance, uniform, observers[MODEL].cut.image_size, dataset)
    entropy = _means(readings, "entropy")
    found.panels["entropy"] = entropy_panel(entropy, dataset)
    measured = {"distance": distance, "entropy": entropy}
    if backbone.num_prefix_tokens:
        masses = {name: heads.prefix.mean(0) for name, heads in readings.items()}  # (blocks, heads, prefix)
        kinds = {"class token": backbone.num_prefix_tokens - backbone.num_registers, "register": backbone.num_registers}
        found.panels["prefix"] = prefix_panel(masses, kinds, len(observers[MODEL].centers), dataset)
        measured["prefix"] = {name: mass.sum(-1) for name, mass in masses.items()}
        found.arrays.update({f"{name}/prefix by token": mass for name, mass in masses.items()})
    else:
        found.left_out["prefix"] = "the model has neither class token nor registers"
    if readings[MODEL].diversity.shape[-1] > 1:
        measured["diversity"] = _means(readings, "diversity")
        found.panels["diversity"] = diversity_panel(measured["diversity"], dataset)
    else:
        found.left_out["diversity"] = "the model has a single head"
    for kind, by_model in measured.items():
        found.arrays.update({f"{name}/{kind}": values for name, values in by_model.items()})
        found.numbers[kind] = {name: values.mean(1).tolist() for name, values in by_model.items()}  # per block
    found.numbers["distance"]["uniform"] = uniform
    return found


def analyze_features(observers: dict[str, Observer], seen: dict[str, Observation]) -> AnalysisResult:
    """The norms of the tokens and the spectrum of the features."""
    found = AnalysisResult.none()
    norms = {name: observation.norms for name, observation in seen.items()}
    block = worst_block(norms[MODEL])
    maps = [NormMap(drawn.crop, drawn.norms[block]) for drawn in seen[MODEL].drawn]
    found.panels["norms"] = norms_panel(norms, maps, block)
    found.numbers["norms"] = {name: part.outliers.mean(0).tolist() for name, part in norms.items()}
    found.numbers["norms"]["outlier"] = f"share of tokens over {OUTLIER:g} times the median of their image, per block"
    for name, (levels, outliers) in norms.items():
        found.arrays.update({f"{name}/norm levels": levels.mean(0), f"{name}/norm outliers": outliers.mean(0)})
    spectra = {name: spectrum(part.features) for name, part in seen.items()}
    kind = "[CLS] tokens" if observers[MODEL].backbone.has_cls else "mean patch tokens"
    found.panels["spectrum"] = spectrum_panel(spectra, features=kind, dataset=len(seen[MODEL].features))
    found.numbers["spectrum"] = {name: {"effective_rank": part.rank} for name, part in spectra.items()}
    found.numbers["spectrum"]["features"] = kind
    found.arrays.update({f"{name}/spectrum": part.shares for name, part in spectra.items()})
    return found


def analyze_layers(cka: Tensor | None, depths: dict[str, int], other: str | None, dataset: int) -> AnalysisResult:
    """Which layers say the same.

    Args:
        cka: (layers, layers) of all models' layers, one model after the other; None for too few images.
        depths: The models in that order, with their numbers of blocks.
        other: What the model of `versus` is called there, if there is one.
        dataset: How many the features were of.
    """
    found = AnalysisResult.none()
    if cka is None:
        why = f"{dataset} images: CKA needs {FEWEST} or more"
        found.left_out.update(dict.fromkeys(["layers", *(["versus"] if other else [])], why))
        return found
    between = dict(zip(depths, torch.split(cka[: depths[MODEL]], list(depths.values()), dim=1), strict=True))
    found.panels["layers"] = layers_panel(between[MODEL], between.get(RANDOM), dataset)
    if other:
        found.panels["versus"] = versus_panel(between[other], other, dataset)
    found.arrays.update({f"{MODEL}/cka with {name}": part for name, part in between.items()})
    return found


def _means(readings: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """(blocks, heads) by model: the mean over the images."""
    return {name: torch.as_tensor(heads._asdict()[kind].mean(0)) for name, heads in readings.items()}


def _rolled(seen: dict[str, Observation]) -> list[Rolled]:
    random = [drawn.rollout for drawn in seen[RANDOM].drawn] if RANDOM in seen else [None] * len(seen[MODEL].drawn)
    rows = []
    for drawn, beside in zip(seen[MODEL].drawn, random, strict=True):
        assert drawn.last is not None  # there is a class token
        assert drawn.rollout is not None
        rows.append(Rolled(drawn.crop, drawn.last, drawn.rollout, beside))
    return rows
