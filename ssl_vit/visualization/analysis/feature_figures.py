"""Token norms and the singular spectrum of the features, with their figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import SubFigure
from torch import Tensor

from ssl_vit.models.feature_statistics import effective_rank
from ssl_vit.visualization.image_grid import TitledFigure, to_pil
from ssl_vit.visualization.plots import COLORS, OTHER, figure_to_image, new_figure, style_axes, style_block_axis

OUTLIER = 3.0  # times the median norm of the image's patch tokens after the same block
QUANTILES = (0.05, 0.5, 0.95, 1.0)  # of the norms of each image


class TokenNorms(NamedTuple):
    """Norms of the patch tokens of n images after each block, before the final norm."""

    levels: Tensor  # (n, blocks, quantiles) over the patches of the image
    outliers: Tensor  # (n, blocks) share of the patches of the image


def token_norms(norms: Tensor) -> TokenNorms:
    """Reduce norms (B, blocks, N) of patch tokens to quantiles and outliers per image and block."""
    median = norms.median(-1, keepdim=True).values
    levels = norms.quantile(norms.new_tensor(QUANTILES), dim=-1).permute(1, 2, 0)
    return TokenNorms(levels.cpu(), (norms > OUTLIER * median).float().mean(-1).cpu())


def block_of_largest_norm(norms: TokenNorms) -> int:
    """Return the block after which the largest norm exceeds the median by the largest factor."""
    means = norms.levels.mean(0)  # (blocks, quantiles)
    return int((means[:, QUANTILES.index(1.0)] / means[:, QUANTILES.index(0.5)]).argmax())


def norms_figure(norms: dict[str, TokenNorms], maps: Sequence[tuple[Tensor, Tensor]], block: int) -> TitledFigure:
    """Draw norms and outliers of each model over the blocks, and maps of the norms after one block.

    The maps are images (C, H, W) uint8 of the first model with the norms (rows, columns) of their patch tokens.
    """
    first = next(iter(norms.values()))
    with new_figure(5.9) as figure:
        parts = figure.add_gridspec(2, 1, height_ratios=[2.7, 3.2])
        _plot_levels(figure.add_subfigure(parts[0]), norms)
        _plot_norm_maps(figure.add_subfigure(parts[1]), maps, block)
        image = figure_to_image(figure)
    share = first.outliers.mean(0)
    text = (
        f"Norms of the patch tokens after each block in {len(first.levels):,} images, and the share whose norm is "
        f"more than {OUTLIER:g} times the median of its image: {100 * float(share.max()):.2f} % at most, after block "
        f"{int(share.argmax())}. Large ViTs without registers have about 2 % of tokens with about ten times the norm, "
        "in uninformative patches that they use as a memory (Darcet et al. 2024); these appear as artifacts in "
        f"attention maps. Below: norms after block {block}, where the largest exceeds the median most."
    )
    return TitledFigure("High-norm tokens", image, text)


def _plot_levels(figure: SubFigure, norms: dict[str, TokenNorms]) -> None:
    sizes, shares = figure.subplots(1, 2)
    for name, (levels, outliers) in reversed(norms.items()):
        low, median, high, largest = levels.mean(0).T.numpy()
        blocks, color = range(len(median)), COLORS[name]
        sizes.fill_between(blocks, low, high, color=color, alpha=0.2, lw=0)
        sizes.plot(blocks, median, "o-", ms=3, lw=1.2, color=color, label=f"{name}: median, and 5 to 95 %")
        sizes.plot(blocks, largest, "^:", ms=3, lw=1, color=color, label=f"{name}: largest")
        shares.plot(blocks, 100 * outliers.mean(0).numpy(), "o-", ms=3, lw=1.2, color=color, label=name)
    style_block_axis(sizes, "norm of the patch tokens")
    style_block_axis(shares, f"over {OUTLIER:g} x the median (%)")
    sizes.set_ylim(bottom=0)
    shares.axhline(2, color=OTHER, lw=1, ls="--", label="large ViTs without registers: about 2 %")
    shares.set_ylim(0, max(2.5, 1.1 * shares.get_ylim()[1]))
    shares.legend(frameon=False, fontsize=8)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)


def _plot_norm_maps(figure: SubFigure, maps: Sequence[tuple[Tensor, Tensor]], block: int) -> None:
    grid = figure.subplots(2, len(maps), squeeze=False)
    top = max(float(norms.max()) for _, norms in maps)
    for (above, below), (image, norms) in zip(grid.T, maps, strict=True):
        above.imshow(to_pil(image))
        drawn = below.imshow(norms.numpy(), cmap="cividis", vmin=0, vmax=top)
        above.set(xticks=[], yticks=[])
        below.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=grid, label=f"norm after block {block}", shrink=0.9)


class Spectrum(NamedTuple):
    """Singular spectrum of features (n, D), not centered."""

    shares: Tensor  # (min(n, D),) singular values over their sum, in descending order
    rank: float  # effective rank


def spectrum(features: Tensor) -> Spectrum:
    """Compute the singular spectrum of finite features (n, D)."""
    values = torch.linalg.svdvals(features.float())
    return Spectrum(values / values.sum(), float(effective_rank(features)))


def spectrum_figure(spectra: dict[str, Spectrum], *, features: str, num_images: int) -> TitledFigure:
    """Draw the spectra of models, the first on top; `features` is the name of the features."""
    first = next(iter(spectra.values()))
    most = len(first.shares)
    with new_figure(3.4) as figure:
        axes = figure.subplots()
        for name, (shares, rank) in reversed(spectra.items()):
            label = f"{name}: effective rank {rank:.1f} of at most {most}"
            axes.plot(range(1, most + 1), shares.numpy(), ".-", ms=3, lw=1, color=COLORS[name], label=label)
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(1e-6, float(first.shares[first.shares > 0].min()) / 2))
        axes.set(xlabel="singular value, in descending order", ylabel="share of the sum of all")
        axes.legend(frameon=False)
        style_axes(axes)
        image = figure_to_image(figure)
    text = (
        f"Singular values of the {features} of {num_images:,} images, not centered. The flatter the curve, the more "
        "directions are used; a steep drop means that the features have collapsed onto a few. The effective rank "
        f"({first.rank:.1f} here, at most {most}) is the exponential of their entropy (RankMe, Garrido et al. 2023); "
        "it grows with the number of images: compare it only at the same number, and between runs of one method."
    )
    return TitledFigure("Singular spectrum of the features", image, text)
