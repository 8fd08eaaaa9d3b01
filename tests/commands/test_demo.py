"""ssl-vit demo: its closing table, and methods without a demo."""

import torch

from ssl_vit.cli import main as ssl_vit
from ssl_vit.commands.demo import table
from ssl_vit.data.annotations.object_masks import annotation_from_mask
from ssl_vit.evaluation.results.eval_result import DataInfo, EvalResult, Metric, ModelInfo, ModelScores
from ssl_vit.evaluation.segmentation.mask_scores import PredictedMasks
from ssl_vit.evaluation.segmentation.patch_mask import Segmentation
from ssl_vit.evaluation.segmentation.segmentation_evaluator import SegmentationEvaluator


def eval_result():
    own, random, pixels = (
        ModelScores(name=name, metrics=[Metric(name="top-1", value=value, n=10, low=0.0, high=1.0)])
        for name, value in (("model", 0.9), ("random init", 0.3), ("raw pixels", 0.4))
    )
    model, data = ModelInfo(name="dino", source="runs/dino"), DataInfo(name="photos")
    return EvalResult(task="knn", protocol={}, model=model, data=data, score=own, baselines=[random, pixels])


def test_demo_table_compares_trained_model_random_weights_and_center_prior(tmp_path):
    generator = torch.Generator().manual_seed(0)
    evaluator = SegmentationEvaluator(tmp_path, mass=0.6, seed=0)
    for index in range(4):
        score_map = torch.rand(6, 6, generator=generator)
        masks = {"tokencut": Segmentation(score_map, score_map > 0.5)}
        predicted = [PredictedMasks(torch.rand(2, 6, 6, generator=generator).softmax(-1), masks) for _ in range(2)]
        evaluator.update(index, predicted, annotation_from_mask(torch.rand(48, 48, generator=generator) > 0.5))
    text = table(eval_result(), eval_result(), evaluator.compute())
    assert "raw pixels" in text
    assert "center prior" in text
    assert "TokenCut" in text
    assert len(text.splitlines()) == 6


def test_demo_of_an_unknown_method_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ssl_vit(["demo", "method=byol"]) == 2
    assert "method: choose one of dino, sit (got 'byol')" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
