"""The demo's closing table names what the evaluations name."""

import torch

from ssl_vit.commands.demo import table
from ssl_vit.data.annotations.object_masks import annotate
from ssl_vit.evaluation.results.eval_result import EvalResult, Metric, ModelScores
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.evaluation.segmentation.segmentation_evaluator import Summary


def record():
    scores = [ModelScores(name, [Metric("top-1", value, 10, 0.0, 1.0)], {}) for name, value in (("a", 0.9), ("b", 0.3))]
    pixels = ModelScores("raw pixels", [Metric("top-1", 0.4, 10, 0.0, 1.0)], {})
    return EvalResult("knn", {}, {}, {}, {}, scores[0], [scores[1], pixels], {}, {}, [])


def test_the_table_holds_model_random_twin_and_center_prior(tmp_path):
    generator = torch.Generator().manual_seed(0)
    summary = Summary(tmp_path, mass=0.6, seed=0)
    for place in range(4):
        soft = torch.rand(6, 6, generator=generator)
        found = {"tokencut": Segmentation(soft, soft > 0.5)}
        seen = [PredictedMasks(torch.rand(2, 6, 6, generator=generator).softmax(-1), found) for _ in range(2)]
        summary.add(place, seen, annotate(torch.rand(48, 48, generator=generator) > 0.5))
    text = table(record(), record(), summary.results())
    assert "raw pixels" in text
    assert "center prior" in text
    assert "TokenCut" in text
    assert len(text.splitlines()) == 6
