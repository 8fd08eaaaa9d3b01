"""Overlays of attention maps and masks."""

import numpy as np
import torch

from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.visualization.overlays import head_figure, make_overlay_inputs, overlay, overlay_grid, resize_map
from ssl_vit.visualization.segmentation_writer import SegmentationWriter


def test_overlays_of_images_of_any_shape_and_number_of_heads():
    for channels, size, heads in ((3, (30, 200), 12), (1, (200, 17), 3), (3, (400, 300), 1)):
        image = torch.randint(0, 256, (channels, *size), dtype=torch.uint8)
        maps = torch.rand(heads, max(1, size[0] // 16), max(1, size[1] // 16))
        maps /= maps.sum((-2, -1), keepdim=True)
        methods = {
            "lost": Segmentation(maps[0], maps[0] > 0.5),
            "+guided": Segmentation(torch.ones(size), torch.rand(size) > 0.5),
        }
        inputs = make_overlay_inputs(image, maps, 0.6, torch.rand(size) > 0.7, methods=methods)
        assert overlay(inputs).size == size[::-1]
        assert head_figure(inputs).width > 240
        assert overlay_grid([("first", inputs), ("second", inputs)]).height > 90


def test_overlay_is_bright_at_the_attention():
    maps = torch.full((2, 4, 4), 0.01)
    maps[:, 1, 2] = 1
    maps /= maps.sum((-2, -1), keepdim=True)
    inputs = make_overlay_inputs(torch.zeros(3, 64, 64, dtype=torch.uint8), maps, 0.6)
    brightness = np.asarray(overlay(inputs)).astype(int).sum(-1)
    assert brightness[20:28, 36:44].min() > 2 * brightness[40:, :24].max()


def test_resize_map_is_bilinear_between_patch_centers():
    map_ = torch.rand(3, 5)
    large = torch.from_numpy(resize_map(map_, (33, 55)).copy())  # 11 pixels per patch: the center pixel is its center
    torch.testing.assert_close(large[5::11, 5::11], map_)
    expected = torch.nn.functional.interpolate(map_[None, None], (33, 55), mode="bilinear", align_corners=False)
    torch.testing.assert_close(large, expected[0, 0])


def test_segmentation_writer_keeps_suffixes_that_distinguish_names(tmp_path):
    writer = SegmentationWriter(tmp_path, ["a.jpg", "a.png", "b/a.jpg", "c.d.jpg"])
    assert writer.stems == ["a.jpg", "a.png", "b/a", "c.d"]
