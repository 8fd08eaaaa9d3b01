"""What `ssl-vit propagate` measured and how: a table for the terminal, and files for later comparisons."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_vit.config.visualize import PropagateConfig
from ssl_vit.evaluation.results import provenance
from ssl_vit.evaluation.results.eval_result import DataInfo, EvalResult, Metric, ModelInfo, ModelScores
from ssl_vit.evaluation.results.statistics import normal_half_width
from ssl_vit.evaluation.video.object_tracking import TILE, TILES, TrackingResult
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.atomic_io import atomic_write
from ssl_vit.visualization.image_grid import INK, PAPER, font, shortened

MODEL, RANDOM, STILL = "model", "random model", "first mask kept still"
INTERVAL = "± 95 % over objects"
MEASURES = ("J-mean", "J-recall", "J-decay", "F-mean", "F-recall", "F-decay")
PROTOCOL = {
    "task": "semi-supervised: the first frame's mask is given; DAVIS-2017's measures over its objects",
    "features": "patch tokens of the last block after the final norm, of length 1",
    "resize": "shorter side to `side` (null: its own, at most 480), nearest multiple of the patch; "
    "longer down to a multiple of 64 (of the patch, "
    "where it does not divide 64); bilinear, antialias; the model's own normalization",
    "labels": "of the first frame and `context` before: `top_k` most similar patches of all frames together within "
    "`radius` patches, weighted by exp(cosine / temperature); soft labels go on, ties at the last place count",
    "pixels": "bilinear to the size seen, each class stretched to 0..1, largest, then nearest pixel at the own size",
    "frames": "those with a given mask, without the first and the last",
    "J": "intersection over union; 1 where the object is in neither mask",
    "F": "of boundaries, within ceil(.008 x diagonal) pixels; 1 where neither mask has one",
    "J&F": "mean of J-mean and F-mean, over objects",
    "recall": "share of the frames above .5",
    "decay": "mean of the first quarter of the frames less that of the last",
    "objects": "the numbers in the first mask; 255 is void and counts neither way",
    "interval": "95 %, normal, over objects; those of one video are not independent",
}


def object_values(videos: list[TrackingResult], follower: str) -> Tensor:
    """Every scored object's J&F, then `MEASURES`: (objects, 7) float64."""
    rows = [(*j, *f) for video in videos if video.values for j, f in video.courses(follower)]
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(MEASURES))
    return torch.cat([(values[:, :1] + values[:, 3:4]) / 2, values], dim=1)


def scores(videos: list[TrackingResult]) -> list[ModelScores]:
    """Means over all objects with their intervals: the model's, then the baselines'; none without scored frames."""
    followers = next((list(video.values) for video in videos if video.values), [])
    found = []
    for follower in followers:
        values = object_values(videos, follower)
        metrics = [_mean(name, column) for name, column in zip(("J&F", *MEASURES), values.unbind(1), strict=True)]
        found.append(ModelScores(name=follower, metrics=metrics))
    return found


def table(videos: list[TrackingResult], found: list[ModelScores]) -> str:
    """A row for each video, and the means over all objects with their 95 % intervals."""
    scored = [video for video in videos if video.values]
    baselines = [f"J&F {score.name}" for score in found[1:]]
    width = max(len(INTERVAL), *(len(video.name) for video in scored))

    def line(name: str, objects: object, frames: object, cells: list[str]) -> str:
        own = "".join(f"{cell:>8}" for cell in cells[:3])
        others = "".join(f"  {cell:>{len(title)}}" for title, cell in zip(baselines, cells[3:], strict=True))
        return f"{name:<{width}}  {objects:>7}  {frames:>6}{own}{others}"

    lines = [line("video", "objects", "frames", ["J", "F", "J&F", *baselines])]
    for video in scored:
        means = [object_values([video], score.name).mean(0).tolist() for score in found]
        values = [means[0][1], means[0][4], means[0][0], *(mean[0] for mean in means[1:])]
        lines.append(line(video.name, len(video.objects), video.scored, [f"{value:.3f}" for value in values]))
    by_name = [{metric.name: metric for metric in score.metrics} for score in found]
    shown = [by_name[0]["J-mean"], by_name[0]["F-mean"], *(metrics["J&F"] for metrics in by_name)]
    frames = sum(video.scored for video in scored)
    lines.append(line("all objects", shown[0].n, frames, [f"{metric.value:.3f}" for metric in shown]))
    if shown[0].n > 1:
        lines.append(line(INTERVAL, "", "", [f"±{(metric.high - metric.low) / 2:.3f}" for metric in shown]))
    rest = [metric for metric in found[0].metrics if metric not in shown]
    lines.append("  ".join(f"{metric.name} {metric.value:.3f}" for metric in rest))
    return "\n".join(lines)


def write_record(
    config: PropagateConfig,
    network: LoadedBackbone,
    videos: list[TrackingResult],
    found: list[ModelScores],
    *,
    warnings: list[str],
    started: float,
) -> None:
    """Write `summary.json` and, with scores, `objects.csv` into `config.out`.

    Args:
        config: Of the command.
        network: Whose features carried the labels.
        videos: All that were followed.
        found: Their scores, the model's first; empty without masks to score by.
        warnings: What was left out.
        started: When the first video was begun, in seconds of `time.perf_counter`.
    """
    device = network.backbone.device
    rule = config.model_dump(include={"side", "context", "radius", "top_k", "temperature"})
    place = config.davis or config.frames
    assert place is not None  # the configuration demands one of them
    counts = {
        "videos": len(videos),
        "frames": sum(video.frames for video in videos),
        "scored_frames": sum(video.scored for video in videos),
        "objects": sum(len(video.objects) for video in videos),
    }
    EvalResult(
        task="propagate",
        protocol={**PROTOCOL, **rule},
        model=ModelInfo(**provenance.model_metadata(network, config.checkpoint, config.weights)),
        data=DataInfo(
            name=place.resolve().stem,
            **config.model_dump(mode="json", include={"davis", "split", "frames", "masks", "limit"}),
            **counts,
        ),
        seeds={"pretrain": provenance.pretraining_seed(network.run), "evaluation": config.seed},
        score=found[0] if found else ModelScores(name=MODEL, metrics=[]),
        baselines=found[1:],
        cost=provenance.runtime_cost(started, device),
        environment={**provenance.environment(device), "forward": "float32"},
        warnings=warnings,
    ).write(config.out / "summary.json")
    if found:
        _write_objects(config.out / "objects.csv", videos, [score.name for score in found])


def sheet(videos: list[TrackingResult]) -> Image.Image:
    """A row of frames for each video, its objects in their colors."""
    left, gap = 130, 6
    heights = [max(tile.height for tile in video.tiles) + gap for video in videos]
    image = Image.new("RGB", (left + TILES * (TILE + gap), gap + sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(image), gap
    for video, height in zip(videos, heights, strict=True):
        draw.text((gap, top), shortened(video.name, left - 2 * gap), INK, font=font(13))
        for place, tile in enumerate(video.tiles):
            image.paste(tile, (left + place * (TILE + gap), top))
        top += height
    return image


def _write_objects(path: Path, videos: list[TrackingResult], followers: list[str]) -> None:
    """One row per object and follower, for paired comparisons of models."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["video", "object", "frames", "by", "J&F", *MEASURES])
    for video in videos:
        for follower in followers if video.values else []:
            for number, row in zip(video.objects, object_values([video], follower).tolist(), strict=True):
                values: list[Any] = [f"{value:.6f}" for value in row]
                writer.writerow([video.name, number, video.scored, follower, *values])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _mean(name: str, values: Tensor) -> Metric:
    """The mean of the objects' values (n,); one object has no interval."""
    n, mean = len(values), values.mean().item()
    least = -1.0 if name.endswith("decay") else 0.0
    half = normal_half_width(values) if n > 1 else 2.0
    low, high = max(least, mean - half), min(1.0, mean + half)
    return Metric(name=name, value=mean, n=n, low=low, high=high, interval="normal, over objects")
