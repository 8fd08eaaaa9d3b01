"""`ssl-vit propagate`: propagate the objects of a video's first frame by frozen features, scored as on DAVIS-2017.

ssl-vit propagate checkpoint=runs/photos davis=DAVIS split=val
ssl-vit propagate checkpoint=runs/photos frames=frames masks=first.png out=tracked
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from ssl_vit.config.visualize import PropagateConfig
from ssl_vit.data.annotations.davis import FPS, Clip, MaskSequence, davis_clips, write_mask
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.data.sources.video_frames import FolderFrames, open_frames
from ssl_vit.data.value_notes import value_notes
from ssl_vit.evaluation.results.result_reader import is_result
from ssl_vit.evaluation.video.label_propagation import PropagationConfig
from ssl_vit.evaluation.video.object_tracking import TrackedFrame, TrackingResult, track_objects
from ssl_vit.evaluation.video.tracking_result import MODEL, RANDOM, STILL, score_table, tracking_scores, write_result
from ssl_vit.models.checkpoint import LoadedBackbone, load_backbone, random_init_like
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.visualization.image_rows import FRAMES_PER_VIDEO, draw_objects, tracking_figure

FIGURE_VIDEOS = 12  # rows of the figure


def main(config: PropagateConfig) -> None:
    """Run the command.

    Raises:
        UserError: There is no video, or one without a usable first frame and mask.
    """
    clips = _load_clips(config)
    inputs = {"frames": config.frames, "masks": config.masks, "davis": config.davis}
    outputs = [config.out / name for name in ("masks", "overview.jpg", "summary.json")]
    check_outputs(outputs, "propagate", inputs=inputs, is_own=is_result(config.out / "summary.json", "propagate"))
    models = _load_models(config, baselines=config.baselines and any(clip.masks.has_multiple for clip in clips))
    record_outputs(outputs, "propagate")
    notes = [note for clip in clips for note in _set_range(clip, models[MODEL])]
    skipped = SkippedImageLog(config.out / "skipped_images.txt")
    skipped.path.unlink(missing_ok=True)
    start = time.perf_counter()
    videos, tiles = _track_all(config, clips, models, skipped)
    seconds = time.perf_counter() - start
    scores = tracking_scores(videos)
    count = skipped.count()
    warnings = list(dict.fromkeys(notes))
    warnings += [remark for video in videos for remark in video.remarks]
    warnings += [f"{count} frames, masks or videos could not be used: see {skipped.path}"] if count else []
    write_result(config, models[MODEL], videos, scores, warnings=warnings, started=start)
    shown = dict(list(tiles.items())[:FIGURE_VIDEOS])
    tracking_figure(shown).save(config.out / "overview.jpg", quality=90, subsampling=0)
    if scores:
        print(score_table(videos, scores))
    frames = sum(video.frames for video in videos)
    print(f"{frames} frames of {len(videos)} videos in {seconds:.0f} s ({seconds / frames:.2f} s a frame)")
    print("\n".join([*warnings, f"{config.out} contains masks/, summary.json and overview.jpg"]))


def _set_range(clip: Clip, model: LoadedBackbone) -> list[str]:
    """Let frames that are image files be read as the images of the model's training; return what is to be known."""
    if not isinstance(clip.frames, FolderFrames):
        return []
    return value_notes(clip.frames.dataset.with_range(model.value_range))


def _track_all(
    config: PropagateConfig, clips: list[Clip], models: dict[str, LoadedBackbone], skipped: SkippedImageLog
) -> tuple[list[TrackingResult], dict[str, list[Image.Image]]]:
    """Track the objects of all videos; return the results and some tiles of each, by its name."""
    still = STILL if RANDOM in models else None  # a baseline, too
    settings = PropagationConfig(config.side, config.context, config.radius, config.top_k, config.temperature)
    videos: list[TrackingResult] = []
    tiles: dict[str, list[Image.Image]] = {}
    total = sum(clip.frames.count or 0 for clip in clips) or None
    with progress_bar(total=total, unit=" frames", desc="propagate") as bar:
        for clip in clips:
            bar.set_postfix_str(clip.name)
            folder = config.out / "masks" / (clip.name if config.davis else "")
            drawn: list[Image.Image] = []
            on_frame = _frame_writer(folder, clip, drawn, bar.update)

            def skip(error: UnreadableImageError, video: str = clip.name) -> None:
                skipped.record(UnreadableImageError(f"{video}/{error.name}", error.reason))

            try:
                videos.append(track_objects(clip, models, settings, still=still, skip=skip, on_frame=on_frame))
                tiles[clip.name] = drawn
            except UserError as error:
                if clip is clips[-1] and not videos:
                    raise
                skipped.record(UnreadableImageError(clip.name, f"the whole video: {error}"))
    return videos, tiles


def _frame_writer(
    folder: Path, clip: Clip, tiles: list[Image.Image], tick: Callable[[], object]
) -> Callable[[TrackedFrame], None]:
    """Return a function that writes the mask of a frame and draws a tile of some frames."""
    shown = set(torch.linspace(0, (clip.frames.count or 1) - 1, FRAMES_PER_VIDEO).round().long().tolist())

    def write(frame: TrackedFrame) -> None:
        name = frame.name
        stem = f"{int(name):06d}" if name.isdecimal() else PurePosixPath(name).with_suffix("").as_posix()
        write_mask(folder / f"{stem}.png", frame.ids, frame.palette)
        if frame.number in shown:
            tiles.append(draw_objects(frame.image, frame.ids, frame.palette))
        tick()

    return write


def _load_clips(config: PropagateConfig) -> list[Clip]:
    if config.davis is not None:
        return davis_clips(config.davis, config.split)[: config.limit]
    assert config.frames is not None  # the config requires both without davis
    assert config.masks is not None
    for key, path in {"frames": config.frames, "masks": config.masks}.items():
        if not path.exists():
            raise UserError(f"{key}={path}: there is no such file or folder")
    frames = open_frames(config.frames, fps=FPS)
    return [Clip(config.frames.resolve().stem, frames, MaskSequence(config.masks))]


def _load_models(config: PropagateConfig, *, baselines: bool) -> dict[str, LoadedBackbone]:
    """Load the model and, where there are scores to compare, its random-init model."""
    models = {MODEL: load_backbone(config.checkpoint, config.weights, require_cls=False, positions=config.positions)}
    channels = models[MODEL].backbone.config.in_chans
    if channels != 3:
        raise UserError(f"checkpoint={config.checkpoint}: frames have 3 channels, the model takes {channels}")
    if baselines:
        models[RANDOM] = random_init_like(models[MODEL], config.seed)
    for model in models.values():
        model.backbone.to(best_device())
    return models
