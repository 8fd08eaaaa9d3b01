"""Figure of attention rollout."""

import numpy as np
import torch

from ssl_vit.visualization.analysis.activation_collector import ExampleMaps
from ssl_vit.visualization.analysis.attention_figures import rollout_figure


def test_rollout_figure_draws_gray_images_and_shares_the_scale_with_random_weights(make_crops):
    uniform = torch.full((4, 4), 1 / 16)
    peak = torch.full((4, 4), 0.01)
    peak[1, 2] = 0.85
    gray, color = make_crops(1, channels=1)[0], make_crops(1)[0]
    norms = torch.ones(1, 4, 4)
    examples = [ExampleMaps(gray, uniform, peak, norms), ExampleMaps(color, uniform, uniform, norms)]
    flat = [example._replace(rollout=uniform) for example in examples]
    with_random = np.asarray(rollout_figure(examples, flat).image).astype(int)
    without = np.asarray(rollout_figure(examples, []).image)
    assert with_random.shape[1] > without.shape[1] > 900
    # The random column is dark on the scale of the model.
    assert np.ptp(with_random[450:700, 1060:1340].sum(-1)) < np.ptp(with_random[80:400, 700:1000].sum(-1))
