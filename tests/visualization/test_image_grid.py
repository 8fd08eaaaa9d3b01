"""Image grids, and the figures of neighbors and of tracked objects."""

import numpy as np
import torch
from PIL import Image

from ssl_vit.visualization.image_grid import captioned, draw_outline, fit_size, image_grid, to_pil
from ssl_vit.visualization.image_rows import NeighborTile, draw_objects, neighbor_figure, tracking_figure


def colors_of(image):
    return {color for _, color in image.getcolors(maxcolors=2**24)}


def test_image_grid_aligns_tiles_of_different_sizes():
    red, blue = Image.new("RGB", (10, 20), (255, 0, 0)), Image.new("RGB", (30, 5), (0, 0, 255))
    grid = image_grid([[red, blue], [blue]], gap=4)
    assert grid.size == (30 + 4 + 30, 20 + 4 + 5)
    assert [grid.getpixel(xy) for xy in ((0, 0), (34, 0), (0, 24))] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert grid.getpixel((34, 10)) == (255, 255, 255)
    bottom = image_grid([[red, blue]], gap=4, align_bottom=True)
    assert bottom.getpixel((34, 19)) == (0, 0, 255)
    titled = image_grid([[red, blue]], gap=4, column_titles=["one", "two\nlines"])
    assert titled.height > grid.height - 9 + 20


def test_captioned_truncates_long_lines():
    image = captioned(Image.new("RGB", (50, 10)), ["a very long line that does not fit"], max_width=50)
    assert image.width <= 50
    assert image.height > 20


def test_to_pil_converts_levels_and_floats_alike():
    levels = torch.randint(0, 256, (3, 6, 9), dtype=torch.uint8)
    assert to_pil(levels).tobytes() == to_pil(levels / 255).tobytes()
    assert to_pil(levels[:1], fit_size(levels, 18)).size == (18, 12)


def test_draw_outline_paints_the_inner_border():
    image, mask = Image.new("RGB", (8, 8)), torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    draw_outline(image, mask, (255, 0, 0))
    painted = torch.from_numpy(np.asarray(image)[..., 0] > 0)
    expected = mask.clone()
    expected[3:5, 3:5] = False
    assert torch.equal(painted, expected)


def test_neighbor_figure_shows_equal_classes_by_borders():
    def colors(*same):
        gray = torch.full((1, 40, 80), 128, dtype=torch.uint8)
        neighbors = [NeighborTile(gray, ["b"], one) for one in same]
        figure = neighbor_figure([[NeighborTile(gray, ["a"], None), *neighbors]])
        return colors_of(figure.crop((0, 0, figure.width, figure.height - 30)))  # without the legend

    green, orange = (0, 140, 100), (213, 94, 0)
    assert green in colors(True)
    assert orange not in colors(True)
    assert orange in colors(False)
    assert not {green, orange} & colors(None)
    assert {green, orange} <= colors(True, False, None)


def test_tracking_figure_shows_objects_in_their_colors():
    frame, numbers = torch.full((3, 30, 60), 100, dtype=torch.uint8), torch.zeros(30, 60, dtype=torch.int64)
    numbers[:, 30:] = 2
    tile = draw_objects(frame, numbers, [0, 0, 0] * 2 + [250, 0, 0] + [0, 0, 0] * 253)
    assert tile.size == (240, 120)
    assert colors_of(tile) == {(75, 75, 75), (190, 39, 39)}
    figure = tracking_figure({"one": [tile, tile], "two": [tile]})
    assert figure.width > 480
    assert figure.height > 240
