"""Figure of the views."""

import pytest

from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.visualization.views_figure import COLORS, views_figure
from tests.helpers.views import load_views


@pytest.mark.parametrize("overrides", [(), ("method=sit",), ("method.views.local_crops.count=0",)])
def test_views_figure_has_the_color_of_every_view(pretrain_config, sample, tmp_path, overrides):
    config = pretrain_config(*overrides)
    examples = load_views(config, scan_image_folder(sample / "train"), tmp_path, count=3)
    image = views_figure(examples)
    assert 500 <= image.width <= 900
    colors = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in image.getcolors(maxcolors=2**24)}
    assert set(COLORS[: len(examples[0].views)]) <= colors
    assert image.height > 3 * 130
