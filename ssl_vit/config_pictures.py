"""The configuration keys of the commands that look at videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from ssl_vit.config import Section, Which
from ssl_vit.config_values import Count, Positive, Seed

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv")  # what can be written


class VideoConfig(Section):
    checkpoint: str
    weights: Which
    video: Path
    out: Path
    head: Annotated[int, Field(ge=0)] | None
    mass: Annotated[float, Field(gt=0, lt=1)]
    max_side: Count | None
    fps: Annotated[float, Field(gt=0, le=1000)]
    limit: Count | None

    @model_validator(mode="after")
    def _a_video_or_a_folder(self) -> Self:
        if self.out.suffix and self.out.suffix.lower() not in VIDEOS:
            raise ValueError(f"out={self.out}: name a video ({', '.join(VIDEOS)}), or a folder without a dot")
        return self


class PropagateConfig(Section):
    checkpoint: str
    weights: Which
    davis: Path | None
    split: str
    frames: Path | None
    masks: Path | None
    out: Path
    side: Count
    context: Annotated[int, Field(ge=0)]
    radius: Count | None
    top_k: Count
    temperature: Positive
    baselines: bool
    seed: Seed
    limit: Count | None

    @model_validator(mode="after")
    def _davis_or_own(self) -> Self:
        if (self.davis is None) == (self.frames is None):
            raise ValueError("name the videos: davis=FOLDER, or frames=FOLDER masks=MASK of your own")
        if (self.frames is None) != (self.masks is None):
            raise ValueError("frames and masks belong together: frames=FOLDER masks=FOLDER or the first frame's mask")
        return self
