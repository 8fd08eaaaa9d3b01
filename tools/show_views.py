"""Draw what the network sees: pictures of a folder, their views, and for SiT what becomes of them.

    python tools/show_views.py data.root=photos out=views.png
    python tools/show_views.py data.root=photos method=sit count=8 out=sit.png

Takes every key of `ssl-vit pretrain`, and `out` (a PNG file) and `count` (pictures, 6 by default).
The rectangles in the originals show where the views of the same colour were cut out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from ssl_vit.commands.compose import load_config
from ssl_vit.config import PretrainConfig, SiTConfig, ViewsConfig
from ssl_vit.data.find import find_pictures
from ssl_vit.data.pictures import BrokenPicture, Pictures
from ssl_vit.errors import UserError
from ssl_vit.transforms.boxes import draw_boxes
from ssl_vit.transforms.corruption import Corruption, rotate
from ssl_vit.transforms.crops import MultiCrop
from ssl_vit.transforms.photometric import Photometric
from ssl_vit.transforms.randomness import fold, sample_keys, uniform, view_keys

COLOURS = pyplot.get_cmap("tab10").colors
CELL_INCHES = 1.5


class Panel(NamedTuple):
    """One picture of the sheet, in [0, 1]."""

    title: str
    picture: Tensor  # (C, H, W)
    view: int  # its number, which gives the colour


def main(words: list[str]) -> None:
    """Read the words, draw the sheet, say where it is."""
    own = {"out": "views.png", "count": "6"}
    own |= {key: value for key, _, value in (word.partition("=") for word in words) if key in own}
    config = load_config("pretrain", [word for word in words if word.partition("=")[0] not in own], PretrainConfig)
    names, pictures = read(find_pictures(config.data.source, config.data.root), int(own["count"]), config)
    keys = sample_keys(config.seed, 0, torch.arange(len(pictures)))

    rows = views_of(pictures, keys, config.method.views)
    if isinstance(config.method, SiTConfig):
        rows = sit_panels(rows, keys, config.method)
    draw(Path(own["out"]), names, pictures, boxes_of(pictures, keys, config.method.views), rows)
    print(f"{len(pictures)} pictures, method={config.method.name}: {own['out']}")


def read(pictures: Pictures, count: int, config: PretrainConfig) -> tuple[list[str], list[Tensor]]:
    """Names and pictures (C, H, W) uint8, spread evenly over the data set; broken ones are left out."""
    names, read_ones = [], []
    for i in torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).long().tolist():
        try:
            read_ones.append(pictures.read(i, config.backbone.in_chans))
            names.append(pictures.name(i))
        except BrokenPicture as broken:
            print(f"left out {broken}")
    return names, read_ones


def boxes_of(pictures: list[Tensor], keys: Tensor, views: ViewsConfig) -> list[list[Rectangle]]:
    """For each picture the outline of each view."""
    kinds = (views.global_crops, 0), (views.local_crops, views.global_crops.count)
    outlines = []
    for picture, key in zip(pictures, keys, strict=True):
        outlines.append([])
        for crops, first in kinds:
            boxes = draw_boxes(view_keys(key, first, crops.count), *picture.shape[1:], crops=crops, flip=views.flip)
            for view, (top, left, height, width, _) in enumerate(zip(*(part.tolist() for part in boxes), strict=True)):
                style = {"edgecolor": COLOURS[(first + view) % 10], "linewidth": 2 if first == 0 else 1}
                outlines[-1].append(Rectangle((left, top), width, height, fill=False, **style))
    return outlines


def views_of(pictures: list[Tensor], keys: Tensor, views: ViewsConfig) -> list[list[Panel]]:
    """Every view as the network gets it, before SiT's corruption."""
    cropper, photometric = MultiCrop(views), Photometric(views)
    cropped = [cropper.one(picture, key) for picture, key in zip(pictures, keys, strict=True)]
    global_views, local_views = (torch.stack(kind) for kind in zip(*cropped, strict=True))  # (B, V, C, H, W) uint8
    rows: list[list[Panel]] = [[] for _ in pictures]
    first = 0
    for kind, batch in (("global", global_views), ("local", local_views)):
        for row, of_picture in zip(rows, shown(photometric(batch, keys, first), views), strict=True):
            row += [Panel(f"{kind} {i + 1}\n{x.shape[-1]} px", x, first + i) for i, x in enumerate(of_picture)]
        first += batch.shape[1]
    return rows


def sit_panels(rows: list[list[Panel]], keys: Tensor, config: SiTConfig) -> list[list[Panel]]:
    """For each picture and view: as cut, turned (what is to be reconstructed), corrupted (what the network sees)."""
    corruption = Corruption(config.corruption)
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.views.mean, config.views.std))
    panels: list[list[Panel]] = [[] for _ in rows]
    for view in range(2):
        view_key = fold(fold(keys, 101), view)
        quarter = (4 * uniform(view_key, 1).squeeze(1)).long() * config.rotation.enabled
        turned = rotate(torch.stack([row[view].picture for row in rows]), quarter)  # (B, C, H, W)
        corrupted = corruption((turned - mean) / std, view_key, view=view)
        seen = shown(corrupted.pictures, config.views)
        for i, of_picture in enumerate(panels):
            hidden = corrupted.mask[i].float()
            of_picture += [
                rows[i][view],
                Panel(f"turned by {90 * int(quarter[i])}°:\nthe target", turned[i], view),
                Panel("corrupted:\nthe input", seen[i], view),
                Panel(f"noise or other\npicture: {hidden.mean():.0%}", hidden, view),
            ]
    return panels


def shown(x: Tensor, views: ViewsConfig) -> Tensor:
    """Normalised views (..., C, H, W) back in [0, 1]."""
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (views.mean, views.std))
    return (x * std + mean).clamp(0, 1)


def draw(
    out: Path, names: list[str], pictures: list[Tensor], boxes: list[list[Rectangle]], rows: list[list[Panel]]
) -> None:
    """One row per picture: the original with the outlines of its views, then the panels."""
    columns = 1 + len(rows[0])
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(columns * CELL_INCHES, len(rows) * CELL_INCHES * 1.3), squeeze=False
    )
    for line, name, picture, outlines, panels in zip(axes, names, pictures, boxes, rows, strict=True):
        show(line[0], picture / 255, f"{Path(name).name[:22]}\n{picture.shape[2]} × {picture.shape[1]}")
        for outline in outlines:
            line[0].add_patch(outline)
        for ax, panel in zip(line[1:], panels, strict=True):
            show(ax, panel.picture, panel.title)
            ax.spines[:].set(visible=True, color=COLOURS[panel.view % 10], linewidth=2)
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def show(ax: Axes, picture: Tensor, title: str) -> None:
    """A picture (C, H, W) in [0, 1] without axes."""
    ax.imshow(picture.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=7)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
