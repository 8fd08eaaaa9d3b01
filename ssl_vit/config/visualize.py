"""Configuration keys of attention, inspect, video, propagate and report; defaults and units are in `conf/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.config.pretrain import CheckpointWeights, ModelConfig
from ssl_vit.config.types import Count, Fraction, OneOrMore, Positive, Seed, StrictConfig

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # writable formats


class MaskValuesConfig(StrictConfig):
    foreground: OneOrMore[int]
    void: list[int]


class MapConfig(ModelConfig):
    """The keys of commands that run a model on images of any size."""

    positions: Literal["timm", "official"]


class AttentionConfig(MapConfig):
    images: Path | None
    masks: Path | None
    mask_values: MaskValuesConfig | None
    voc: Path | None
    split: str
    out: Path
    methods: OneOrMore[Literal["attention", "lost", "tokencut", "pca", "found"]]
    refine: Literal["guided"] | None
    attention_mass: Fraction
    max_side: Count | None
    baselines: bool
    seed: Seed
    limit: Count | None

    @model_validator(mode="after")
    def _images_given(self) -> Self:
        if (self.images is None) == (self.voc is None):
            raise ValueError("name the images: images=FOLDER, or voc=VOCdevkit/VOC2012")
        if self.voc is not None and self.masks is not None:
            raise ValueError("masks applies to images; voc has its own masks")
        if self.mask_values is not None and self.masks is None:
            raise ValueError("mask_values applies to masks: masks=FOLDER")
        return self


class InspectConfig(ModelConfig):
    images: Path | None
    compare_to: str | None
    out: Path | None
    image_size: Count | None
    baselines: bool
    seed: Seed
    limit: Count


class VideoConfig(MapConfig):
    video: Path
    out: Path
    head: Annotated[int, Field(ge=0)] | None
    attention_mass: Fraction
    max_side: Count | None
    fps: Annotated[float, Field(gt=0, le=1000)]
    limit: Count | None

    @model_validator(mode="after")
    def _video_or_folder(self) -> Self:
        if self.out.suffix and self.out.suffix.lower() not in VIDEO_SUFFIXES:
            raise ValueError(
                f"out={self.out}: must be a video file ({', '.join(VIDEO_SUFFIXES)}), or a folder, without a suffix"
            )
        return self


class PropagateConfig(MapConfig):
    davis: Path | None
    split: str
    frames: Path | None
    masks: Path | None
    out: Path
    side: Count | None
    context: Annotated[int, Field(ge=0)]
    radius: Count | None
    top_k: Count
    temperature: Positive
    baselines: bool
    seed: Seed
    limit: Count | None

    @model_validator(mode="after")
    def _davis_or_frames(self) -> Self:
        if (self.davis is None) == (self.frames is None):
            raise ValueError("name the videos: davis=FOLDER, or frames=FOLDER masks=MASK for your own")
        if (self.frames is None) != (self.masks is None):
            raise ValueError(
                "frames and masks must be given together: frames=FOLDER masks=FOLDER, or masks=FILE for the first frame"
            )
        return self


class ReportDataConfig(EvalDataConfig):
    @model_validator(mode="after")
    def _images_given(self) -> Self:  # a report does not need labeled images
        return self

    @property
    def named(self) -> bool:
        """Whether labeled images are given."""
        return self.root is not None or self.train is not None


class ReportConfig(StrictConfig):
    run: Path
    weights: CheckpointWeights
    data: ReportDataConfig
    features: Path | None
    images: Path | None
    masks: Path | None
    mask_values: MaskValuesConfig | None
    limit: Count
    max_side: Count | None
    attention_mass: Fraction
    k: Count
    points: Annotated[int, Field(ge=3, le=1000)]
    inspect: bool
    projection: Literal["pca", "tsne"]
    seed: Seed
    out: Path | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.masks is not None and self.images is None:
            raise ValueError("masks requires images: images=FOLDER masks=FOLDER")
        if self.out is not None and self.out.suffix != ".html":
            raise ValueError(f"out={self.out}: the report must be an .html file")
        return self
