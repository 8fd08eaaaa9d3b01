"""Tokens of unusually high norm: whether a model uses patches of the background as registers."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import SubFigure
from torch import Tensor

from ssl_vit.visualization.image_grid import TitledFigure, to_pil
from ssl_vit.visualization.plots import COLORS, OTHER, block_axis, figure_to_image, new_figure, plain_style

OUTLIER = 3.0  # times the median norm of the image's patch tokens behind the same block
LEVELS = (0.05, 0.5, 0.95, 1.0)  # quantiles that are kept of each image


class TokenNorms(NamedTuple):
    """The norms of n images' patch tokens behind each block, before the final norm, which would even them out."""

    levels: Tensor  # (n, blocks, levels) quantiles over the image's patches
    outliers: Tensor  # (n, blocks) share of the image's patches


def token_norms(norms: Tensor) -> TokenNorms:
    """Reduce norms (B, blocks, N) of patch tokens to numbers per image and block."""
    median = norms.median(-1, keepdim=True).values
    levels = norms.quantile(norms.new_tensor(LEVELS), dim=-1).permute(1, 2, 0)
    return TokenNorms(levels.cpu(), (norms > OUTLIER * median).float().mean(-1).cpu())


class NormMap(NamedTuple):
    """One image with the norms of its patch tokens behind one block."""

    image: Tensor  # (C, H, W) uint8
    norms: Tensor  # (rows, columns)


def worst_block(norms: TokenNorms) -> int:
    """The block behind which the largest norm stands out most from the median."""
    means = norms.levels.mean(0)  # (blocks, levels)
    return int((means[:, LEVELS.index(1.0)] / means[:, LEVELS.index(0.5)]).argmax())


def norms_panel(norms: dict[str, TokenNorms], maps: list[NormMap], block: int) -> TitledFigure:
    """Norms and outliers over the blocks, and some images with where the norms are high.

    Args:
        norms: By model.
        maps: Of the first of them.
        block: Behind which they were taken.
    """
    first = next(iter(norms.values()))
    with plain_style():
        figure = new_figure(5.9)
        parts = figure.add_gridspec(2, 1, height_ratios=[2.7, 3.2])
        upper, lower = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
        _draw_levels(upper, norms)
        _draw_maps(lower, maps, block)
        image = figure_to_image(figure)
    share = first.outliers.mean(0)
    text = (
        f"Norms of the patch tokens behind each block in {len(first.levels):,} images, and the share whose norm is "
        f"more than {OUTLIER:g} times the median of its image: here {100 * float(share.max()):.2f} % at most, behind "
        f"block {int(share.argmax())}. Large ViTs without registers keep about 2 % of their tokens at about ten times "
        "the norm, in dull patches that they use as a memory (Darcet et al. 2024); attention maps then show specks. "
        f"Below: norms behind block {block}, where the largest stands out most."
    )
    return TitledFigure("High-norm tokens", image, text)


def _draw_levels(figure: SubFigure, norms: dict[str, TokenNorms]) -> None:
    sizes, shares = figure.subplots(1, 2)
    for name, (levels, outliers) in reversed(norms.items()):
        low, median, high, most = levels.mean(0).T.numpy()
        blocks, color = range(len(median)), COLORS[name]
        sizes.fill_between(blocks, low, high, color=color, alpha=0.2, lw=0)
        sizes.plot(blocks, median, "o-", ms=3, lw=1.2, color=color, label=f"{name}: median, and 5 to 95 %")
        sizes.plot(blocks, most, "^:", ms=3, lw=1, color=color, label=f"{name}: largest")
        shares.plot(blocks, 100 * outliers.mean(0).numpy(), "o-", ms=3, lw=1.2, color=color, label=name)
    block_axis(sizes, "norm of the patch tokens")
    block_axis(shares, f"over {OUTLIER:g} x the median (%)")
    sizes.set_ylim(bottom=0)
    shares.axhline(2, color=OTHER, lw=1, ls="--", label="large ViTs without registers: about 2 %")
    shares.set_ylim(0, max(2.5, 1.1 * shares.get_ylim()[1]))
    shares.legend(frameon=False, fontsize=8)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)


def _draw_maps(figure: SubFigure, maps: list[NormMap], block: int) -> None:
    grid = figure.subplots(2, len(maps), squeeze=False)
    top = max(float(norms.max()) for _, norms in maps)
    drawn = None
    for (above, below), (picture, norms) in zip(grid.T, maps, strict=True):
        above.imshow(to_pil(picture, (picture.shape[-2], picture.shape[-1])))
        drawn = below.imshow(norms.numpy(), cmap="cividis", vmin=0, vmax=top)
        for axes in (above, below):
            axes.set_xticks([])
            axes.set_yticks([])
    assert drawn is not None
    figure.colorbar(drawn, ax=grid, label=f"norm behind block {block}", shrink=0.9)
