"""Results with random predictions, and the output of `ssl-vit compare`."""

import uuid
from datetime import UTC, datetime

import torch

from ssl_vit.cli import main
from ssl_vit.evaluation.results.eval_result import (
    DataInfo,
    EvalResult,
    ModelInfo,
    ModelScores,
    Predictions,
    topk_metrics,
)

COUNT = 400


def random_correct(share, seed):
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(seed)) < share


def make_scores(name, share, seed, suffix=", k=20"):
    rank = (~random_correct(share, seed)).long()
    target = torch.arange(COUNT) % 4
    predictions = Predictions(torch.arange(COUNT), target, (target + rank) % 4, rank)
    return ModelScores(name=name, metrics=topk_metrics(rank, 4, suffix), predictions={suffix: predictions})


def make_result(name="dino", share=0.6, *, seed=0, task="knn", pixels=0.3, data="photos", **protocol):
    suffix = ", k=20" if task == "knn" else ""
    return EvalResult(
        task=task,
        protocol={"temperature": 0.07, "transform": {"image_size": 32}, **protocol},
        model=ModelInfo(name=name, sha256=f"{name:0>64}", source=f"runs/{name}"),
        data=DataInfo(name=data, fingerprints=["a", "b"], n_train=100, n_test=COUNT, n_classes=4),
        score=make_scores("model", share, seed, suffix),
        baselines=[make_scores("random init", 0.2, len(name), suffix), make_scores("raw pixels", pixels, 9, suffix)],
    )


def changed(result, **fields):
    """Return a later result with other fields."""
    later = {"id": uuid.uuid4().hex, "created": datetime.now(UTC).isoformat(timespec="microseconds")}
    return result.model_copy(update=later | fields)


def write_result(path, *args, **fields):
    make_result(*args, **fields).write(path)
    return path


def compare_output(capsys, *overrides):
    assert main(["compare", *map(str, overrides)]) == 0
    return capsys.readouterr().out


def compare_error(capsys, *overrides):
    assert main(["compare", *map(str, overrides)]) == 2
    out, error = capsys.readouterr()
    assert "Traceback" not in out + error
    return error
