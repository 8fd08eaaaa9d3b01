"""Results of `ssl-vit propagate`: the JSON, the scores of every object, and a table for the terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.config.visualize import PropagateConfig
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.eval_result import DataInfo, EvalResult, Metric, ModelInfo, ModelScores
from ssl_vit.evaluation.results.statistics import normal_half_width
from ssl_vit.evaluation.video.davis_metrics import sequence_stats
from ssl_vit.evaluation.video.object_tracking import TrackingResult
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.runtime.text import csv_text, format_table

MODEL, RANDOM, STILL = "model", "random init", "first mask kept still"
INTERVAL = "± 95 % over objects"
MAIN_METRIC = "J&F"
MEASURES = ("J-mean", "J-recall", "J-decay", "F-mean", "F-recall", "F-decay")
PROTOCOL = {
    "task": "semi-supervised: the first frame's mask is given; DAVIS-2017's measures over its objects",
    "features": "patch tokens of the last block after the final norm, of length 1",
    "resize": "shorter side to `side` (null: its own, at most 480), nearest multiple of the patch; "
    "longer down to a multiple of 64 (of the patch, "
    "where it does not divide 64); bilinear, antialias; the model's own normalization",
    "labels": "of the first frame and `context` before: `top_k` most similar patches of all frames together within "
    "`radius` patches, weighted by exp(cosine / temperature); soft labels are propagated, ties with the last count",
    "pixels": "bilinear to the model's input size, each class scaled to 0..1, largest, then nearest pixel at own size",
    "frames": "those with a mask, without the first and the last",
    "J": "intersection over union; 1 where the object is in neither mask",
    "F": "of boundaries, within ceil(.008 x diagonal) pixels; 1 where neither mask has one",
    "J&F": "mean of J-mean and F-mean, over objects",
    "recall": "share of the frames above .5",
    "decay": "mean of the first quarter of the frames less that of the last",
    "objects": "the IDs in the first mask; 255 is void and ignored",
    "interval": "95 %, normal, over objects; those of one video are not independent",
}


def object_scores(videos: list[TrackingResult], tracker: str) -> Tensor:
    """Return J&F, then `MEASURES`, of every scored object: (objects, 7) float64."""
    scored = [video.values[tracker].unbind(1) for video in videos if video.values]
    rows = [(*sequence_stats(j), *sequence_stats(f)) for objects in scored for j, f in objects]
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(MEASURES))
    return torch.cat([(values[:, :1] + values[:, 3:4]) / 2, values], dim=1)


def tracking_scores(videos: list[TrackingResult]) -> list[ModelScores]:
    """Return the means over all objects: the model's, then the baselines'; none without scored frames."""
    trackers = next((list(video.values) for video in videos if video.values), [])
    scores = []
    for tracker in trackers:
        columns = zip((MAIN_METRIC, *MEASURES), object_scores(videos, tracker).unbind(1), strict=True)
        scores.append(ModelScores(name=tracker, metrics=[_mean_metric(name, column) for name, column in columns]))
    return scores


def score_table(videos: list[TrackingResult], scores: list[ModelScores]) -> str:
    """Return a row for each video, the means over all objects with their intervals, and the other metrics."""
    scored = [video for video in videos if video.values]
    headers = ["video", "objects", "frames", "J", "F", MAIN_METRIC]
    headers += [f"{MAIN_METRIC} {score.name}" for score in scores[1:]]
    rows = []
    for video in scored:
        means = [object_scores([video], score.name).mean(0).tolist() for score in scores]
        values = [means[0][1], means[0][4], *(mean[0] for mean in means)]
        rows.append([video.name, str(len(video.objects)), str(video.scored), *(f"{value:.3f}" for value in values)])
    by_name = [{metric.name: metric for metric in score.metrics} for score in scores]
    shown = [by_name[0]["J-mean"], by_name[0]["F-mean"], *(metrics[MAIN_METRIC] for metrics in by_name)]
    frames = str(sum(video.scored for video in scored))
    rows.append(["all objects", str(shown[0].n), frames, *(f"{metric.value:.3f}" for metric in shown)])
    if shown[0].n > 1:
        rows.append([INTERVAL, "", "", *(f"±{(metric.high - metric.low) / 2:.3f}" for metric in shown)])
    others = [metric for metric in scores[0].metrics if metric not in shown]
    return "\n".join([format_table(rows, headers), "  ".join(f"{metric.name} {metric.value:.3f}" for metric in others)])


def write_result(
    config: PropagateConfig,
    model: LoadedBackbone,
    videos: list[TrackingResult],
    scores: list[ModelScores],
    *,
    warnings: list[str],
    started: float,
) -> None:
    """Write `summary.json` and, with scores (the model's first), `objects.csv` into `config.out`."""
    device = model.backbone.device
    source = config.davis or config.frames
    assert source is not None  # the config requires one of them
    EvalResult(
        task="propagate",
        title="Video object segmentation",
        main_metrics=[MAIN_METRIC],
        protocol=PROTOCOL
        | config.model_dump(include={"side", "context", "radius", "top_k", "temperature", "positions"}),
        model=ModelInfo(**provenance.model_metadata(model, config.checkpoint, config.weights)),
        data=DataInfo(
            name=source.resolve().stem,
            **config.model_dump(mode="json", include={"davis", "split", "frames", "masks", "limit"}),
            videos=len(videos),
            num_frames=sum(video.frames for video in videos),
            scored_frames=sum(video.scored for video in videos),
            objects=sum(len(video.objects) for video in videos),
        ),
        seeds={"pretrain": provenance.pretraining_seed(model.run), "evaluation": config.seed},
        score=scores[0] if scores else ModelScores(name=MODEL, metrics=[]),
        baselines=scores[1:],
        cost=provenance.runtime_cost(started, device),
        environment={**provenance.environment(device), "forward": "float32"},
        warnings=warnings,
    ).write(config.out / "summary.json")
    if scores:
        _write_objects(config.out / "objects.csv", videos, [score.name for score in scores])


def _write_objects(path: Path, videos: list[TrackingResult], trackers: list[str]) -> None:
    """Write one row per object and tracker, for paired comparisons of models."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["video", "object", "frames", "tracker", MAIN_METRIC, *MEASURES])
    for video in videos:
        for tracker in trackers if video.values else []:
            for number, row in zip(video.objects, object_scores([video], tracker).tolist(), strict=True):
                name = csv_text(video.name)
                writer.writerow([name, number, video.scored, tracker, *(f"{value:.6f}" for value in row)])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _mean_metric(name: str, values: Tensor) -> Metric:
    """Return the mean of the objects' values (n,); one object has no interval."""
    n, mean = len(values), values.mean().item()
    least = -1.0 if name.endswith("decay") else 0.0
    half = normal_half_width(values) if n > 1 else 2.0
    low, high = max(least, mean - half), min(1.0, mean + half)
    return Metric(name=name, value=mean, n=n, low=low, high=high, interval="normal, over objects")
