"""Configuration keys of the evaluations and of fine-tuning; defaults and units are in `conf/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssl_vit.config.methods import OptimizerConfig
from ssl_vit.config.pretrain import (
    CheckpointWeights,
    LoggerConfig,
    ModelConfig,
    RunConfig,
    Source,
    TrainerConfig,
    Workers,
)
from ssl_vit.config.types import (
    POSITIONAL,
    Count,
    Fraction,
    NonNegative,
    OneOrMore,
    OverrideList,
    PathList,
    Positive,
    Probability,
    Range,
    Ratio,
    Seed,
    Share,
    StrictConfig,
    ValueRangeField,
)


class EvalDataConfig(StrictConfig):
    source: Source
    root: Path | None
    train: Path | None
    test: Path | None
    range: ValueRangeField | None
    batch_size: Count
    num_workers: Workers
    crop_ratio: Share
    image_size: Count | None

    @model_validator(mode="after")
    def _images_given(self) -> Self:
        if self.root is None and self.train is None:
            raise ValueError("name the labeled images: data.root=FOLDER, or data.train=FOLDER data.test=FOLDER")
        return self

    @model_validator(mode="after")
    def _root_or_train(self) -> Self:
        if self.root is not None and self.train is not None:
            raise ValueError("data.root and data.train exclude each other: data.root contains train/ and val/ or test/")
        if self.test is not None and self.train is None:
            raise ValueError("data.test requires data.train")
        return self


class LabeledEvalConfig(ModelConfig):
    data: EvalDataConfig
    seed: Seed
    out: Path | None
    logger: LoggerConfig


class EvaluationConfig(LabeledEvalConfig):
    baselines: bool
    features: Path | None


class KNNConfig(EvaluationConfig):
    k: OneOrMore[Count]
    temperature: OneOrMore[Positive]
    engine: Literal["auto", "torch", "faiss"]
    figure: bool


class SGDConfig(StrictConfig):
    lr: OneOrMore[Positive]
    weight_decay: OneOrMore[NonNegative]
    epochs: Count
    batch_size: Count


class LinearConfig(EvaluationConfig):
    protocol: Literal["held-out", "dino", "sit"]
    epochs: Count | None
    solver: Literal["logistic", "ridge", "sgd"]
    blocks: OneOrMore[Count]
    l2: OneOrMore[Positive]
    sgd: SGDConfig
    val_fraction: Fraction
    figure: bool

    @model_validator(mode="after")
    def _fits_the_protocol(self) -> Self:
        if self.protocol == "held-out" and self.epochs is not None:
            raise ValueError("epochs applies to protocol=dino and protocol=sit only")
        if self.protocol != "held-out" and self.solver != "logistic":
            raise ValueError(f"solver={self.solver} applies to protocol=held-out only, not to {self.protocol}")
        if self.protocol == "sit" and self.data.batch_size % 2:
            raise ValueError(
                f"data.batch_size={self.data.batch_size}: protocol=sit mixes images in pairs, so it must be even"
            )
        return self


class CompareConfig(StrictConfig):
    results: Annotated[PathList, POSITIONAL]
    format: Literal["text", "markdown", "latex"]
    mix: bool
    out: Path | None

    @model_validator(mode="after")
    def _results_given(self) -> Self:
        if not self.results:
            raise ValueError("name results or run directories: ssl-vit compare runs/photos runs/other")
        return self


class FeatureCommandConfig(ModelConfig):
    data: EvalDataConfig
    features: Path | None


class NeighborsConfig(FeatureCommandConfig):
    images: Path | None
    k: Count
    limit: Count
    index: Literal["exact", "ivf"]
    recall: Share
    seed: Seed
    out: Path

    @model_validator(mode="after")
    def _image_suffix(self) -> Self:
        if self.out.suffix not in (".png", ".jpg"):
            raise ValueError(f"out={self.out}: the image grid must be a .png or .jpg file")
        return self


class FeaturesConfig(FeatureCommandConfig):
    blocks: Count
    to: Literal["npz", "parquet"] | None
    out: Path | None
    pca: bool

    @model_validator(mode="after")
    def _file_and_format(self) -> Self:
        if (self.to is None) != (self.out is None):
            raise ValueError("to and out must be given together: to=npz out=FILE.npz, or to=parquet out=FILE.parquet")
        if self.pca and self.to != "parquet":
            raise ValueError("pca=true adds columns to a parquet file: to=parquet out=FILE.parquet")
        return self


class FewshotConfig(EvaluationConfig):
    shots: list[Count]
    shares: list[Share]
    subsets: Count
    blocks: Count
    patch_mean: bool
    l2: OneOrMore[Positive]


class TransferDataConfig(StrictConfig):
    roots: Annotated[OverrideList, Field(min_length=1)]
    batch_size: Count
    num_workers: Workers
    crop_ratio: Share


class TransferConfig(StrictConfig):
    checkpoints: Annotated[OverrideList, Field(min_length=1)]
    weights: CheckpointWeights
    data: TransferDataConfig
    linear: OverrideList
    seed: Seed
    out: Path


class RandomResizedCropConfig(StrictConfig):
    scale: Range
    ratio: Ratio


class RandAugmentConfig(StrictConfig):
    layers: Annotated[int, Field(ge=0)]
    magnitude: Annotated[float, Field(ge=0, le=10)]
    std: NonNegative


class AugmentationConfig(StrictConfig):
    crops: RandomResizedCropConfig
    flip: Probability
    rand_augment: RandAugmentConfig
    erasing: Probability
    mixup: NonNegative
    cutmix: NonNegative
    smoothing: Annotated[float, Field(ge=0, lt=1)]


class FinetuneMethodConfig(AugmentationConfig):
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    layer_decay: Share
    optimizer: OptimizerConfig

    @property
    def name(self) -> str:
        """Name of the method in checkpoints."""
        return "finetune"


class FinetuneConfig(LabeledEvalConfig):
    cache_gb: NonNegative
    val_fraction: Fraction
    method: FinetuneMethodConfig
    validate_every_epochs: Count | None
    figure: bool
    run: RunConfig
    trainer: TrainerConfig

    @property
    def depends_on_num_processes(self) -> bool:
        """Whether another number of processes changes the loss."""
        return self.method.mixup > 0 or self.method.cutmix > 0  # images are mixed within a process

    @model_validator(mode="after")
    def _fits_the_trainer(self) -> Self:
        if self.trainer.strategy == "fsdp":
            raise ValueError("trainer.strategy=fsdp: fine-tuning needs the whole model in each process")
        size = self.trainer.micro_batch_size(self.data.batch_size)
        if self.depends_on_num_processes and size % 2:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} means {size} images per process and micro-batch; mixup and "
                f"cutmix mix images in pairs: make it a multiple of {2 * self.trainer.micro_batches}"
            )
        return self
