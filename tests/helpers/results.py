"""Made-up records for the tests of `ssl-vit compare`, and how it answers."""

import torch

from ssl_vit.cli import main
from ssl_vit.evaluation.results.eval_result import EvalResult, ModelScores, Predictions, topk_metrics

COUNT = 400


def right(share, seed):
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(seed)) < share


def scored(name, share, seed, suffix=", k=20"):
    rank = (~right(share, seed)).long()
    truth = torch.arange(COUNT) % 4
    answers = Predictions(torch.arange(COUNT), truth, (truth + rank) % 4, rank)
    return ModelScores(name, topk_metrics(rank, 4, suffix), {}, {suffix: answers})


def record(name="dino", share=0.6, *, seed=0, task="knn", pixels=0.3, data="photos", **protocol):
    suffix = ", k=20" if task == "knn" else ""
    return EvalResult(
        task=task,
        protocol={"temperature": 0.07, "transform": {"image_size": 32}, **protocol},
        model={"name": name, "sha256": f"{name:0>64}", "source": f"runs/{name}"},
        data={"name": data, "fingerprints": ["a", "b"], "n_train": 100, "n_test": COUNT, "n_classes": 4},
        seeds={},
        score=scored("model", share, seed, suffix),
        baselines=[scored("random init", 0.2, len(name), suffix), scored("raw pixels", pixels, 9, suffix)],
        cost={},
        environment={},
        warnings=[],
    )


def written(path, *args, **changes):
    record(*args, **changes).write(path)
    return path


def shown(capsys, *words):
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    assert main(["compare", *map(str, words)]) == 2
    out, error = capsys.readouterr()
    assert "Traceback" not in out + error
    return error
