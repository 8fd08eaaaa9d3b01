"""The sheet of views: per image its views, with frames in it that show where they were cut out."""

from __future__ import annotations

from PIL import Image, ImageDraw
from torch import Tensor

from ssl_vit.visualization.first_step_views import FirstStepViews
from ssl_vit.visualization.image_grid import INK, PAPER, fit_size, font, shortened, to_pil

GAP = 10
IMAGE, GLOBAL, LOCAL, PUZZLE = 210, 132, 62, 122  # pixels of a tile's longer side
LOCAL_COLUMNS = 5
TEXT = 18  # height of a line
# Of the views, in their order: dark enough for white numbers, and apart for the color-blind as far as ten can be.
COLORS = ("#0b62b0", "#c44e00", "#15794f", "#a3195b", "#6b4fbb", "#8a6100", "#00788a", "#b3261e", "#4d6b00", "#5b5b5b")
PUZZLE_TITLES = "as it was cut", "turned: the target", "corrupted: given", "hidden is white"


def views_sheet(seen: list[FirstStepViews]) -> Image.Image:
    """One row per image: the image with the frames of its views, then these.

    For SiT one line per view in place of its small tiles: as it was cut, turned, corrupted, and what of it is hidden.

    Args:
        seen: Of one run; at least one image.
    """
    rows = [_sit_row(one) if one.puzzles else _row(one) for one in seen]
    legend = [
        "The frame with a view's number and color is where the view was cut out; a view may be mirrored.",
        "Tiles show what the model was given: cut, resized, with their colors changed.",
    ]
    if seen[0].puzzles:
        legend[1] = "SiT turns each view, then hides parts of it; the model has to restore the target."
    titles = _titles(seen[0])
    width = max([row.width for row in rows] + [int(GAP + font(13).getlength(line)) for line in legend]) + GAP
    head = GAP + TEXT + 6
    sheet = Image.new("RGB", (width, head + sum(row.height for row in rows) + len(legend) * TEXT + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, title in titles:
        draw.text((left, GAP), title, INK, font=font(14))
    top = head
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    for number, line in enumerate(legend):
        draw.text((GAP, top + number * TEXT), line, INK, font=font(13))
    return sheet


def _titles(one: FirstStepViews) -> list[tuple[int, str]]:
    """Of the columns, with their left edges."""
    start = GAP + IMAGE + GAP
    if one.puzzles:
        return [(GAP, "image"), *((start + n * (PUZZLE + 8), title) for n, title in enumerate(PUZZLE_TITLES))]
    sizes = [view.shape[-1] for view in one.views]
    titles = [(GAP, "image"), (start, f"global views, {sizes[0]} px")]
    if len(one.views) > 2:
        titles.append((start + 2 * (GLOBAL + 8) + GAP, f"local views, {sizes[-1]} px"))
    return titles


def _row(one: FirstStepViews) -> Image.Image:
    """An image, its two global views, and its local views in lines of five."""
    local = max(0, len(one.views) - 2)
    lines = -(-local // LOCAL_COLUMNS)
    left = GAP + IMAGE + GAP
    small_left = left + 2 * (GLOBAL + 8) + GAP
    width = small_left + min(local, LOCAL_COLUMNS) * (LOCAL + 8) + GAP
    row, height = _with_image(one, width, max(GLOBAL, lines * (LOCAL + 8)))
    for number, view in enumerate(one.views):
        if number < 2:
            place, side = (left + number * (GLOBAL + 8), 0), GLOBAL
        else:
            line, column = divmod(number - 2, LOCAL_COLUMNS)
            place, side = (small_left + column * (LOCAL + 8), line * (LOCAL + 8)), LOCAL
        _paste_view(row, view, number, place, side)
    return row.crop((0, 0, width, height))


def _sit_row(one: FirstStepViews) -> Image.Image:
    """An image, and a line of four tiles for each view."""
    left, step = GAP + IMAGE + GAP, PUZZLE + 8
    line = PUZZLE + TEXT + 4
    row, height = _with_image(one, left + len(PUZZLE_TITLES) * step, len(one.puzzles) * line)
    draw = ImageDraw.Draw(row)
    for number, (view, puzzle) in enumerate(zip(one.views, one.puzzles, strict=True)):
        top = number * line
        hidden = puzzle.hidden.float()[None]
        for column, tile in enumerate((view, puzzle.target, puzzle.given, hidden)):
            _paste_view(row, tile, number, (left + column * step, top), PUZZLE)
        for column, text in ((1, f"by {90 * puzzle.quarter}°"), (3, f"{hidden.mean():.0%}")):
            draw.text((left + column * step, top + PUZZLE), text, INK, font=font(13))
    return row.crop((0, 0, row.width, height))


def _with_image(one: FirstStepViews, width: int, height: int) -> tuple[Image.Image, int]:
    """A row with the image at its left, and how high it is."""
    size = fit_size(one.image, IMAGE)
    height = max(height, size[0] + 2 * TEXT) + GAP
    row = Image.new("RGB", (width, height), PAPER)
    row.paste(_framed(one, size), (GAP, 0))
    draw = ImageDraw.Draw(row)
    draw.text((GAP, size[0] + 1), shortened(one.name, IMAGE), INK, font=font(13))
    pixels = f"{one.image.shape[2]} x {one.image.shape[1]} px"
    draw.text((GAP, size[0] + TEXT), pixels, INK, font=font(13))
    return row, height


def _framed(one: FirstStepViews, size: tuple[int, int]) -> Image.Image:
    """The image at this height and width with the numbered frames of its views; the global ones lie above."""
    image = to_pil(one.image, size)
    draw = ImageDraw.Draw(image)
    factor = size[0] / one.image.shape[1], size[1] / one.image.shape[2]
    for number, (top, left, height, width) in reversed(list(enumerate(one.boxes))):
        corner = round(left * factor[1]), round(top * factor[0])
        end = round((left + width) * factor[1]) - 1, round((top + height) * factor[0]) - 1
        draw.rectangle((*corner, *end), outline=_color(number), width=3 if number < 2 else 2)
    for number, (top, left, _, _) in reversed(list(enumerate(one.boxes))):
        _tag(draw, number, (round(left * factor[1]), round(top * factor[0])))
    return image


def _paste_view(row: Image.Image, view: Tensor, number: int, place: tuple[int, int], side: int) -> None:
    """A view (C, S, S) in [0, 1] as a square tile in the frame of its color, with its number."""
    tile = to_pil((view * 255).round().byte(), (side, side))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, side - 1, side - 1), outline=_color(number), width=3 if side > LOCAL else 2)
    _tag(draw, number, (0, 0))
    row.paste(tile, place)


def _tag(draw: ImageDraw.ImageDraw, number: int, corner: tuple[int, int]) -> None:
    """The number of a view, from 1, white on its color."""
    text = str(number + 1)
    width = int(font(12).getlength(text)) + 7
    draw.rectangle((*corner, corner[0] + width, corner[1] + 15), fill=_color(number))
    draw.text((corner[0] + 4, corner[1]), text, "white", font=font(12))


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]
