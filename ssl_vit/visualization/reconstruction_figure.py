"""The sheet of reconstructions: input, corrupted, reconstruction and error of each image, with its distances."""

from __future__ import annotations

import matplotlib
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from ssl_vit.visualization.image_grid import INK, PAPER, font, to_pil
from ssl_vit.visualization.reconstructions import Distance, Reconstruction, means

GAP, TILE, STEP = 10, 132, 140
TEXT = 17  # height of a line
NUMBERS = 270  # width of the columns of numbers
TITLES = "image", "corrupted: given", "reconstruction", "error"
WORST = 0.5  # mean absolute difference of a pixel's channels that has the brightest color
OUTLINE = (70, 225, 255)  # of what was hidden


def reconstruction_sheet(reconstructions: list[Reconstruction]) -> Image.Image:
    """One row per image, with the means over all images below.

    Args:
        reconstructions: At least one.
    """
    width = GAP + len(TITLES) * STEP + NUMBERS
    head, row, foot = GAP + 22, STEP + 6, 9 * TEXT
    sheet = Image.new("RGB", (width, head + len(reconstructions) * row + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES):
        draw.text((GAP + column * STEP, GAP - 2), title, INK, font=font(14))
    right = GAP + len(TITLES) * STEP + 6
    for place, one in enumerate(reconstructions):
        top = head + place * row
        error = (one.restored - one.clean).abs().mean(dim=0)  # (S, S)
        tiles = _tile(one.clean), _tile(one.corrupted), _tile(one.restored), _error_tile(error, one.hidden)
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (GAP + column * STEP, top))
        share = one.hidden.float().mean().item()
        _numbers(draw, (right, top - 2), {f"hidden pixels, {share:.0%}": one.on_hidden, "all pixels": one.on_all})
    top = head + len(reconstructions) * row
    count = sum(bool(one.on_hidden) for one in reconstructions)
    parts = {
        f"mean of {count}: hidden pixels": means([one.on_hidden for one in reconstructions]),
        "all pixels": means([one.on_all for one in reconstructions]),
    }
    _numbers(draw, (right, top), parts)
    _legend(sheet, (GAP, top))
    return sheet


def _numbers(draw: ImageDraw.ImageDraw, corner: tuple[int, int], parts: dict[str, dict[str, Distance]]) -> None:
    """A small table: per part its name, and per answer its L1 and PSNR."""
    left, top = corner
    for title, distances in parts.items():
        draw.text((left, top), title, INK, font=font(12))
        for place, heading in ((168, "L1"), (212, "PSNR")):
            draw.text((left + place, top), heading, INK, font=font(12))
        top += TEXT
        for name, found in distances.items():
            draw.text((left + 10, top), name, INK, font=font(12))
            draw.text((left + 168, top), f"{found.l1:.3f}", INK, font=font(12))
            draw.text((left + 212, top), f"{found.psnr:.1f} dB", INK, font=font(12))
            top += TEXT
        top += 3 if distances else TEXT


def _legend(sheet: Image.Image, corner: tuple[int, int]) -> None:
    """The colors of the error, and what hidden means."""
    left, top = corner
    width = 160
    ramp = matplotlib.colormaps["inferno"](torch.linspace(0, 1, width).numpy(), bytes=True)[None, :, :3]
    sheet.paste(Image.fromarray(ramp.repeat(12, axis=0)), (left, top + 4))
    draw = ImageDraw.Draw(sheet)
    draw.text((left + width + 8, top), f"error: 0 to {WORST} and more (mean over channels)", INK, font=font(13))
    draw.rectangle((left, top + 26, left + 10, top + 36), outline=OUTLINE, width=2)
    lines = [
        "     hidden pixels: noise or another image stands there",
        "Gray or blurred blocks do not count as hidden. Images are upright;",
        "values run from 0 to 1. The mean color is that of what is not hidden:",
        "a model that does not beat it restores nothing.",
    ]
    draw.multiline_text((left, top + 23), "\n".join(lines), INK, font=font(13))


def _tile(image: Tensor) -> Image.Image:
    return to_pil((image * 255).round().byte(), (TILE, TILE))


def _error_tile(error: Tensor, hidden: Tensor) -> Image.Image:
    """Errors (S, S) in colors, pixel by pixel, with the outline of what was hidden (S, S) bool."""
    colors = matplotlib.colormaps["inferno"]((error / WORST).clamp(0, 1).numpy(), bytes=True)[..., :3]
    tile = Image.fromarray(colors).resize((TILE, TILE), Image.Resampling.NEAREST)
    whole = Image.fromarray(hidden.numpy()).convert("L").resize((TILE, TILE), Image.Resampling.NEAREST)
    tile.paste(OUTLINE, (0, 0), ImageChops.subtract(whole, whole.filter(ImageFilter.MinFilter(3))))
    return tile
