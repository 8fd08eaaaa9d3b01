"""The configuration keys of the commands that look at a trained network: evaluations and attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssl_vit.config import LoggerConfig, Section, Source, Which, Workers
from ssl_vit.config_values import Count, NonNegative, Positive, Seed, Share, Words


class EvalDataConfig(Section):
    source: Source
    root: Path | None
    train: Path | None
    test: Path | None
    batch_size: Count
    workers: Workers
    crop_ratio: Share
    image_size: Count | None

    @model_validator(mode="after")
    def _some_pictures(self) -> Self:
        if self.root is None and self.train is None:
            raise ValueError("name the labelled pictures: data.root=FOLDER, or data.train=FOLDER data.test=FOLDER")
        if self.root is not None and self.train is not None:
            raise ValueError("data.root and data.train exclude each other: data.root holds train/ and val/ or test/")
        if self.test is not None and self.train is None:
            raise ValueError("data.test needs data.train beside it")
        return self


class EvaluationConfig(Section):
    checkpoint: str
    weights: Which
    data: EvalDataConfig
    baselines: bool
    seed: Seed
    out: Path | None
    features: Path | None
    logger: LoggerConfig


class KNNConfig(EvaluationConfig):
    k: Annotated[list[Count], Field(min_length=1)]
    temperature: Annotated[list[Positive], Field(min_length=1)]
    engine: Literal["auto", "torch", "faiss"]
    sheet: bool


class SGDConfig(Section):
    lr: Annotated[list[Positive], Field(min_length=1)]
    weight_decay: Annotated[list[NonNegative], Field(min_length=1)]
    epochs: Count
    batch_size: Count


class LinearConfig(EvaluationConfig):
    solver: Literal["logistic", "ridge", "sgd"]
    blocks: Annotated[list[Count], Field(min_length=1)]
    l2: Annotated[list[Positive], Field(min_length=1)]
    sgd: SGDConfig
    held_out: Annotated[float, Field(gt=0, lt=1)]
    sheet: bool


class CompareConfig(Section):
    records: list[Path]
    format: Literal["text", "markdown", "latex"]
    mix: bool
    out: Path | None

    @model_validator(mode="after")
    def _some_records(self) -> Self:
        if not self.records:
            raise ValueError("name records or run folders: ssl-vit compare runs/photos runs/other")
        return self


class NeighboursConfig(Section):
    checkpoint: str
    weights: Which
    data: EvalDataConfig
    images: Path | None
    k: Count
    limit: Count
    index: Literal["exact", "ivf"]
    recall: Annotated[float, Field(gt=0, le=1)]
    seed: Seed
    out: Path

    @model_validator(mode="after")
    def _a_picture(self) -> Self:
        if self.out.suffix not in (".png", ".jpg"):
            raise ValueError(f"out={self.out}: the sheet is a picture, name it .png or .jpg")
        return self


class FeaturesConfig(Section):
    checkpoint: str
    weights: Which
    data: EvalDataConfig
    blocks: Count
    features: Path | None
    to: Literal["npz", "parquet"] | None
    out: Path | None
    pca: bool

    @model_validator(mode="after")
    def _file_and_form(self) -> Self:
        if (self.to is None) != (self.out is None):
            raise ValueError("to and out belong together: to=npz out=FILE.npz, or to=parquet out=FILE.parquet")
        if self.pca and self.to != "parquet":
            raise ValueError("pca=true adds columns to a parquet file: to=parquet out=FILE.parquet")
        return self


class FewshotConfig(EvaluationConfig):
    shots: list[Count]
    shares: list[Share]
    subsets: Count
    blocks: Count
    patch_mean: bool
    l2: Annotated[list[Positive], Field(min_length=1)]


class TransferDataConfig(Section):
    roots: Annotated[Words, Field(min_length=1)]
    batch_size: Count
    workers: Workers
    crop_ratio: Share


class TransferConfig(Section):
    checkpoints: Annotated[Words, Field(min_length=1)]
    weights: Which
    data: TransferDataConfig
    linear: Words
    seed: Seed
    out: Path


class AttentionConfig(Section):
    checkpoint: str
    weights: Which
    images: Path
    masks: Path | None
    out: Path
    mass: Annotated[float, Field(gt=0, lt=1)]
    max_side: Count | None
    baselines: bool
    seed: Seed
    limit: Count | None
