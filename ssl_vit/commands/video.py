"""`ssl-vit video`: draw the attention of the [CLS] token over every frame of a video.

ssl-vit video checkpoint=runs/photos video=clip.mp4 out=overlay.mp4
ssl-vit video checkpoint=runs/photos video=frames out=overlays head=3
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType

from ssl_vit.config.visualize import VideoConfig
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.video_frames import FolderFrames, open_frames
from ssl_vit.data.value_notes import value_notes
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.device import best_device
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.visualization.attention_video import (
    AttentionRenderer,
    image_writer,
    iter_attention,
    video_codec,
    video_writer,
)

MAX_LISTED = 5  # skipped frames


def main(config: VideoConfig) -> None:
    """Draw all frames; after Ctrl-C the finished frames are kept next to `out`, in a video that plays.

    Raises:
        UserError: No frame can be used, or the model has no class token or other channels.
        KeyboardInterrupt: Ctrl-C was pressed; an earlier file at `out` is unchanged.
    """
    _check_paths(config)
    frames = open_frames(config.video, fps=config.fps)
    model = load_backbone(config.checkpoint, config.weights, positions=config.positions)
    if isinstance(frames, FolderFrames):
        notes = value_notes(frames.dataset.with_range(model.value_range))
        print("".join(f"{note}\n" for note in notes), end="")
    if (channels := model.backbone.config.in_chans) != 3:
        raise UserError(f"checkpoint={config.checkpoint}: the model takes {channels} channels, frames have 3")
    model.backbone.to(best_device())
    skipped: list[UnreadableImageError] = []
    total = min(frames.count or config.limit or 0, config.limit or frames.count or 0) or None
    as_video = bool(config.out.suffix)
    path = config.out.with_stem(f"{config.out.stem}-stopped") if as_video else config.out  # until all frames are done
    writer = video_writer(path, rate=frames.rate, clock=frames.clock) if as_video else image_writer(path)
    renderer, written, start = AttentionRenderer(config.attention_mass), 0, time.perf_counter()
    read = islice(frames.read(skipped.append), config.limit)
    batches = iter_attention(read, model, head=config.head, max_side=config.max_side, skip=skipped.append)
    with _catch_ctrl_c() as stopped, writer as write, progress_bar(total=total, unit=" frames", desc="video") as bar:
        for batch in batches:
            for (frame, _), image in zip(batch, renderer.draw(batch), strict=True):
                write(frame.name, image, frame.time)
                written += 1
                bar.update()
            if stopped:
                break
        if written:
            record_outputs([config.out], "video")
        else:
            raise UserError(f"video={config.video}: no frame could be used; {_list_skipped(skipped)}")
    codec = video_codec() if as_video else "JPEG"
    if stopped:
        of_total = f" of {total}" if total else ""
        print(f"stopped: the first {written}{of_total} frames are in {path} ({codec})")
        raise KeyboardInterrupt
    if as_video:
        path.replace(config.out)
    seconds = time.perf_counter() - start
    print(f"{written} frames in {seconds:.0f} s ({written / seconds:.1f} per second) in {config.out} ({codec})")
    if skipped:
        print(f"{len(skipped)} frames could not be used: {_list_skipped(skipped)}")


def _check_paths(config: VideoConfig) -> None:
    if not config.video.exists():
        raise UserError(f"video={config.video}: there is no such file or directory")
    check_outputs([config.out], "video", inputs={"video": config.video})


@contextmanager
def _catch_ctrl_c() -> Iterator[list[int]]:
    """Provide a list that is empty until Ctrl-C is pressed; a second Ctrl-C stops at once."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _list_skipped(skipped: list[UnreadableImageError]) -> str:
    rest = [f"and {len(skipped) - MAX_LISTED} more"] if len(skipped) > MAX_LISTED else []
    return "; ".join([*map(str, skipped[:MAX_LISTED]), *rest]) or "there are no frames"
