"""How many directions the features use: their singular values and their effective rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.models.feature_statistics import effective_rank
from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.plots import COLORS, figure_to_image, new_figure, plain_style, style_axes


class Spectrum(NamedTuple):
    """Of features (n, D), uncenterd."""

    shares: Tensor  # (min(n, D),) singular values over their sum, the largest first
    rank: float  # effective rank


def spectrum(features: Tensor) -> Spectrum:
    """The singular spectrum of finite features (n, D)."""
    values = torch.linalg.svdvals(features.float())
    return Spectrum(values / values.sum(), float(effective_rank(features)))


def spectrum_panel(spectra: dict[str, Spectrum], *, features: str, dataset: int) -> TitledFigure:
    """The spectra of models, the first drawn on top.

    Args:
        spectra: By model.
        features: What they are of.
        dataset: How many the features are of.
    """
    first = next(iter(spectra.values()))
    most = len(first.shares)
    with plain_style():
        figure = new_figure(3.4)
        axes = figure.subplots()
        for name, (shares, rank) in reversed(spectra.items()):
            label = f"{name}: effective rank {rank:.1f} of at most {most}"
            places = range(1, most + 1)
            axes.plot(places, shares.numpy(), ".-", ms=3, lw=1, color=COLORS[name], label=label)
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(1e-6, float(first.shares[first.shares > 0].min()) / 2))
        axes.set_xlabel("singular value, the largest first")
        axes.set_ylabel("share of the sum of all")
        axes.legend(frameon=False)
        style_axes(axes)
        image = figure_to_image(figure)
    text = (
        f"Singular values of the {features} of {dataset:,} images, not centerd. The flatter, the more directions "
        f"are used; a cliff means that the features have collapsed onto a few. The effective rank ({first.rank:.1f} "
        f"here, at most {most}) is the exponential of their entropy (RankMe, Garrido et al. 2023); it grows with "
        "the number of images, so compare it only at the same number, and only between runs of one method."
    )
    return TitledFigure("Singular spectrum of the features", image, text)
