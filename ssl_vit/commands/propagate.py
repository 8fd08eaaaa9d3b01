"""`ssl-vit propagate`: the first frame's objects carried through a video by frozen features, scored as on DAVIS-2017.

ssl-vit propagate checkpoint=runs/photos davis=DAVIS split=val
ssl-vit propagate checkpoint=runs/photos frames=frames masks=first.png out=followed
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from ssl_vit.config.visualize import PropagateConfig
from ssl_vit.data.annotations.davis import Clip, custom_clip, davis_clips
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.evaluation.video.label_propagation import PropagationConfig
from ssl_vit.evaluation.video.object_tracking import TrackingResult, track_objects
from ssl_vit.evaluation.video.tracking_result import MODEL, RANDOM, STILL, scores, sheet, table, write_record
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, random_init_like
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.progress import progress_bar

SHEET_ROWS = 12  # videos on the sheet


def main(config: PropagateConfig) -> None:
    """Run the command.

    Raises:
        UserError: There is no video, or one without a usable first frame and mask.
    """
    clips = _clips(config)
    baselines = config.baselines and any(clip.masks.has_multiple for clip in clips)
    models = _models(config, baselines=baselines)
    rule = PropagationConfig(config.side, config.context, config.radius, config.top_k, config.temperature)
    skipped = _fresh_list(config.out / "skipped_images.txt")
    start = time.perf_counter()
    videos: list[TrackingResult] = []
    still = STILL if baselines else None
    with progress_bar(
        total=sum(clip.frames.count or 0 for clip in clips) or None, unit=" frames", desc="propagate"
    ) as bar:
        for clip in clips:
            bar.set_postfix_str(clip.name)
            out = config.out / "masks" / (clip.name if config.davis else "")
            skip = partial(_skip, skipped, clip.name)
            try:
                videos.append(track_objects(clip, models, rule, out=out, still=still, skip=skip, tick=bar.update))
            except UserError as error:
                if clip is clips[-1] and not videos:
                    raise
                skipped.record(UnreadableImageError(clip.name, f"the whole video: {error}"))
    seconds = time.perf_counter() - start
    found = scores(videos)
    left_out = skipped.count()
    warnings = [f"{left_out} frames, masks or videos could not be used: {skipped.path} says why"] if left_out else []
    write_record(config, models[MODEL], videos, found, warnings=warnings, started=start)
    sheet(videos[:SHEET_ROWS]).save(config.out / "sheet.jpg", quality=90, subsampling=0)
    if found:
        print(table(videos, found))
    frames = sum(video.frames for video in videos)
    print(f"{frames} frames of {len(videos)} videos in {seconds:.0f} s ({seconds / frames:.2f} s a frame)")
    print("\n".join([*warnings, f"{config.out} holds masks/, summary.json and sheet.jpg"]))


def _clips(config: PropagateConfig) -> list[Clip]:
    if config.davis is not None:
        return davis_clips(config.davis, config.split)[: config.limit]
    assert config.frames is not None  # the configuration demands both with no davis
    assert config.masks is not None
    for key, place in {"frames": config.frames, "masks": config.masks}.items():
        if not place.exists():
            raise UserError(f"{key}={place}: there is no such file or folder")
        if config.out.absolute().is_relative_to(place.absolute()):
            raise UserError(f"out={config.out} lies inside {key}={place}: choose a folder outside of it")
    return [custom_clip(config.frames, config.masks)]


def _models(config: PropagateConfig, *, baselines: bool) -> dict[str, LoadedBackbone]:
    """The model, and beside it, where there are scores to compare, the same with random weights."""
    models = {MODEL: load_backbone(config.checkpoint, config.weights, require_cls=False)}
    if models[MODEL].backbone.config.in_chans != 3:
        raise UserError(f"checkpoint={config.checkpoint}: frames have 3 channels, the model takes another number")
    if baselines:
        models[RANDOM] = random_init_like(models[MODEL], config.seed)
    for model in models.values():
        model.backbone.to(best_device())
    return models


def _skip(skipped: SkippedImageLog, clip: str, broken: UnreadableImageError) -> None:
    skipped.record(UnreadableImageError(f"{clip}/{broken.name}", broken.reason))


def _fresh_list(path: Path) -> SkippedImageLog:
    path.unlink(missing_ok=True)
    return SkippedImageLog(path)
