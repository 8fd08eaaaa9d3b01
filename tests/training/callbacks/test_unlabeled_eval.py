"""Tests of the statistics of features without labels in runs from weights."""

import math

import numpy as np
import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.feature_statistics import effective_rank, neighbor_stability, uniformity
from ssl_vit.training.callbacks import unlabeled_eval
from ssl_vit.training.callbacks.unlabeled_eval import METRICS, EnlargedCenter
from tests.helpers.cli import assert_same_run, checkpoint, rows

LIVELY = ("start.freeze_backbone=0%", "start.ramp=0%", "start.backbone_lr=1e-2", "online.every_epochs=1")


@pytest.fixture
def config(tiny_model, pretrain_words, sample):
    """A function: the configuration of a run from weights on images of one folder."""
    words = [word for word in pretrain_words() if not word.startswith("backbone")]
    folder = sorted((sample / "train").iterdir())[0]
    words += [f"checkpoint={tiny_model}", f"data.root={folder}", "data.batch_size=8", "trainer.max_steps=7", *LIVELY]
    return lambda *more: load_config("pretrain", [*words, *more], PretrainConfig)


def state_of(run):
    return checkpoint(run)["callbacks"]["UnlabeledEval"]


def slow_neighbors(features, k):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return [{*[j for j in np.argsort(-(unit @ row)) if j != i][:k]} for i, row in enumerate(unit)]


def test_statistics_equal_those_of_the_exported_models(config, capsys):
    run = pretrain(config())
    found = state_of(run)
    dataset, features = build_dataset("folder", config().data.root), {}
    for point, name in (("initial", "start.safetensors"), ("last", "backbone.safetensors")):
        loaded = load_backbone(run / name)
        how = {"batch_size": 64, "num_workers": 0, "skipped": SkippedImageLog(run / "none.txt")}
        transform = EvalTransform(32, 0.875, loaded.mean, loaded.std)
        features[point] = extract(BackboneExtractor(loaded, transform, blocks=1), dataset, **how).cls[:, -1].float()
        values = found[point]["values"]
        assert values["effective_rank"] == pytest.approx(float(effective_rank(features[point])), rel=1e-3)
        assert values["uniformity"] == pytest.approx(float(uniformity(features[point])), rel=1e-3)
        assert 0 < values["alignment"] < 4
    before, after = (slow_neighbors(each.double().numpy(), 10) for each in features.values())
    kept = np.mean([len(one & other) / 10 for one, other in zip(before, after, strict=True)])
    assert found["last"]["values"]["neighbor_stability"] == pytest.approx(kept, abs=0.02)  # of equally near ones
    assert kept < 1
    output = capsys.readouterr().out
    assert "Without labels: effective rank" in output
    assert f"{100 * found['last']['values']['neighbor_stability']:.1f} %" in output
    first = rows(run)[0]
    assert float(first["unlabeled/neighbor_stability"]) == 1
    assert {name: float(first[f"unlabeled/{name}"]) for name in METRICS} == found["initial"]["values"]


def test_resumed_run_compares_with_the_same_start(config, stop_at, capsys):
    whole = pretrain(config("run.name=whole"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("  start w", "  last"))]
    with stop_at(4):
        pretrain(config("run.name=parts"))
    capsys.readouterr()
    parts = pretrain(config("run.name=parts", "run.resume=true"))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(("  start w", "  last"))] == table
    assert len(table) == 2
    assert_same_run(whole, parts)
    assert str(state_of(whole)) == str(state_of(parts))


def test_statistics_switched_on_at_resume_are_those_of_the_start_weights(config, stop_at):
    whole = pretrain(config("run.name=whole"))
    with stop_at(4):
        pretrain(config("run.name=parts", "online.every_epochs=null"))
    parts = pretrain(config("run.name=parts", "run.resume=true"))
    assert str(state_of(whole)) == str(state_of(parts))


def test_resume_without_the_file_of_the_start_weights_continues_without_comparison(config, stop_at, caplog):
    with stop_at(4):
        run = pretrain(config("online.every_epochs=null"))
    (run / "start.safetensors").unlink()
    pretrain(config("run.resume=true"))
    assert "nothing is compared with the start weights" in caplog.text
    assert state_of(run)["initial"] is None
    assert math.isnan(state_of(run)["last"]["values"]["neighbor_stability"])


def test_runs_with_labels_or_from_random_weights_have_no_such_statistics(config, sample, pretrain_config):
    run = pretrain(config(f"data.root={sample / 'train'}", "trainer.max_steps=1"))
    assert not [name for name in rows(run)[0] if name.startswith("unlabeled/")]
    run = pretrain(pretrain_config(f"data.root={config().data.root}", "online.every_epochs=1", "run.name=random"))
    assert not [name for name in rows(run)[0] if name.startswith("unlabeled/")]


def test_features_that_cannot_be_evaluated_give_nan(config, monkeypatch, caplog):
    original = unlabeled_eval.extract_in_training

    def spoiled(*args, **kwargs):
        features = original(*args, **kwargs)
        features.cls.fill_(math.nan)
        return features

    monkeypatch.setattr(unlabeled_eval, "extract_in_training", spoiled)
    run = pretrain(config())
    assert {row["unlabeled/effective_rank"] for row in rows(run) if row["unlabeled/effective_rank"]} == {"nan"}
    assert "no statistics of features at step 7" in caplog.text


@pytest.mark.parametrize("side", [32, 50])
def test_enlarged_center_differs_from_the_first_view_at_any_size(side):
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    how = 32, 0.875, [0.5] * 3, [0.5] * 3
    one, other = EvalTransform(*how)(image), EnlargedCenter(*how)(image)
    assert one.shape == other.shape == (3, 32, 32)
    assert not torch.equal(one, other)


def test_neighbor_stability_counts_what_is_kept():
    before = torch.tensor([[1, 2], [0, 2], [0, 1]], dtype=torch.int16)
    after = torch.tensor([[2, 1], [3, 2], [4, 5]])
    assert neighbor_stability(before, after).item() == pytest.approx((1 + 0.5 + 0) / 3)
