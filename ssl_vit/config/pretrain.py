"""Configuration keys of pretraining and of the commands without a model; defaults and units are in `conf/`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ssl_vit.config.methods import MethodName, SelectedMethodConfig
from ssl_vit.config.types import (
    Count,
    DurationField,
    NonNegative,
    OverrideList,
    Positive,
    ResumeChoice,
    Seed,
    Share,
    StrictConfig,
    ValueRangeField,
    WallTime,
)

# --- a run -----------------------------------------------------------------------------------------------------


def _check_printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a run's name is one line of printable characters")
    return name


class RunDirConfig(StrictConfig):
    # A single folder name, not ..
    name: Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$"), AfterValidator(_check_printable)]
    folder: Path
    resume: bool
    overwrite: bool

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.folder / self.name

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: choose one")
        return self


class RunConfig(RunDirConfig):
    resume: ResumeChoice  # type: ignore[assignment]
    extend_to_epochs: Count | None
    keep_image_list: bool

    @model_validator(mode="after")
    def _only_on_resume(self) -> Self:
        if (self.extend_to_epochs or self.keep_image_list) and not self.resume:
            raise ValueError("extend_to_epochs and keep_image_list apply to a resumed run: add run.resume=true")
        return self


class TrainerConfig(StrictConfig):
    max_epochs: Count
    max_steps: Count | None
    max_time: WallTime | None
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Count
    num_nodes: Count
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    accumulate_grad_batches: Count
    fused_attention: Literal["auto"] | bool
    compile: Literal["auto"] | bool
    activation_checkpointing: bool
    log_every_n_steps: Count
    checkpoint_every: WallTime
    keep_every_epochs: Count | None
    max_skipped_steps: Annotated[int, Field(ge=0)]

    @property
    def micro_batches(self) -> int:
        """Number of parts that a batch is computed in: of each process and accumulated step one."""
        return self.devices * self.num_nodes * self.accumulate_grad_batches

    def micro_batch_size(self, batch_size: int) -> int:
        """Return the images per process and micro-batch.

        Raises:
            ValueError: That is no whole number.
        """
        if batch_size % self.micro_batches:
            raise ValueError(
                f"data.batch_size={batch_size} (over all processes) is not a multiple of devices x num_nodes x "
                f"accumulate_grad_batches = {self.micro_batches}"
            )
        return batch_size // self.micro_batches


class LoggerConfig(StrictConfig):
    name: Literal["csv", "wandb"]
    project: str
    offline: bool


class OnlineEvalConfig(StrictConfig):
    root: Path | None
    reference: Path | None
    every_epochs: Count | None
    train_images: Count
    val_images: Count
    k: Annotated[list[Count], Field(min_length=1)]
    select_best: bool | Literal["auto"]


class ImageLoggingConfig(StrictConfig):
    root: Path | None
    every_epochs: Count | None
    num_images: Count


# --- data ------------------------------------------------------------------------------------------------------

Source = Literal["folder", "list", "shards", "cifar10", "cifar100", "stl10"]
Workers = Literal["auto"] | Annotated[int, Field(ge=0)]


class PretrainDataConfig(StrictConfig):
    source: Source
    root: Path
    range: ValueRangeField
    batch_size: Count
    num_workers: Workers
    cache_gb: NonNegative


# --- backbone --------------------------------------------------------------------------------------------------


class BackboneConfig(StrictConfig):
    name: str
    img_size: Count
    patch_size: Count
    in_chans: Count
    reg_tokens: Annotated[int, Field(ge=0)]
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    embed_dim: Count | None
    depth: Annotated[int, Field(ge=1, le=1000)] | None
    num_heads: Count | None
    init: Literal["timm", "jax"]

    def overridden(self) -> list[str]:
        """Return what the keys change of the model that `name` stands for: `patch_size=16 instead of 8`."""
        said = {"patch_size": r"_patch(\d+)", "reg_tokens": r"_reg(\d+)", "img_size": r"_(\d{2,4})(?:\.|$)"}
        named = {key: int(match[1]) for key, form in said.items() if (match := re.search(form, self.name))}
        changed = {key: value for key, value in named.items() if getattr(self, key) != value}
        found = [f"{key}={getattr(self, key)} instead of {value}" for key, value in changed.items()]
        return found + [
            f"{key}={value}" for key in ("embed_dim", "depth", "num_heads") if (value := getattr(self, key))
        ]

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


CheckpointWeights = Literal["teacher", "student"]


# --- where training starts from --------------------------------------------------------------------------------


class StartConfig(StrictConfig):
    name: Literal["scratch", "weights"]
    trainable: Annotated[str, Field(pattern=r"^(all|norms|last_[1-9]\d*_blocks|lora_[1-9]\d*)$")]
    freeze_backbone: DurationField
    ramp: DurationField
    backbone_lr: Positive | Literal["auto"] | None
    layer_decay: Share
    patch_embed_lr: Share

    @property
    def lora_rank(self) -> int | None:
        """Rank of the low-rank updates, or None."""
        return int(self.trainable.removeprefix("lora_")) if self.trainable.startswith("lora_") else None


class AnchorConfig(StrictConfig):
    name: Literal["none", "gram", "l2sp", "features"]
    weight: NonNegative


class ModelConfig(StrictConfig):
    """The keys of every command that loads a model."""

    checkpoint: str
    weights: CheckpointWeights


# --- commands --------------------------------------------------------------------------------------------------


class TrainingConfig(StrictConfig):
    """The sections that `pretrain` and `bench` share."""

    seed: Seed
    data: PretrainDataConfig
    backbone: BackboneConfig
    method: SelectedMethodConfig
    trainer: TrainerConfig

    @model_validator(mode="after")
    def _views_fit_the_backbone(self) -> Self:
        channels, views = self.backbone.in_chans, self.method.views
        if channels not in (1, 3):
            raise ValueError(f"backbone.in_chans={channels}: images are read with 1 (gray) or 3 (RGB) channels")
        if not len(views.mean) == len(views.std) == channels:
            raise ValueError(f"backbone.in_chans={channels} needs {channels} values in method.views.mean and .std")
        for name, crops in {"global_crops": views.global_crops, "local_crops": views.local_crops}.items():
            if crops.count and crops.size % self.backbone.patch_size:
                raise ValueError(
                    f"method.views.{name}.size={crops.size} is not a multiple of backbone.patch_size="
                    f"{self.backbone.patch_size}"
                )
        return self

    @model_validator(mode="after")
    def _fits_the_trainer(self) -> Self:
        trainer, batch_size, multiple = self.trainer, self.data.batch_size, self.method.batch_multiple
        if trainer.strategy == "fsdp" and trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.strategy=fsdp does not support 16-mixed: use trainer.precision=bf16-mixed or 32-true"
            )
        size = trainer.micro_batch_size(batch_size)
        if trainer.devices * trainer.num_nodes > 1 and size % multiple:
            step = multiple * trainer.micro_batches
            raise ValueError(
                f"data.batch_size={batch_size} means {size} images per process and micro-batch; "
                f"method={self.method.name} with several processes needs a multiple of {multiple} there, as "
                f"data.batch_size={math.ceil(batch_size / step) * step}"
            )
        return self


class PretrainConfig(TrainingConfig):
    checkpoint: str | None
    weights: CheckpointWeights
    start: StartConfig
    anchor: AnchorConfig
    run: RunConfig
    logger: LoggerConfig
    online: OnlineEvalConfig
    image_logging: ImageLoggingConfig

    @property
    def depends_on_num_processes(self) -> bool:
        """Whether another number of processes changes the loss."""
        return self.method.depends_on_num_processes

    @model_validator(mode="after")
    def _no_pretrained_tag(self) -> Self:
        architecture, dot, tag = self.backbone.name.partition(".")
        if dot and self.checkpoint is None:
            raise ValueError(
                f"backbone.name={self.backbone.name}: the tag {tag} stands for trained weights, and training starts "
                f"from random ones: write backbone.name={architecture}, or checkpoint=timm:{self.backbone.name}"
            )
        return self

    @model_validator(mode="after")
    def _start_needs_a_checkpoint(self) -> Self:
        if self.checkpoint is None:
            if self.start.name == "weights":
                raise ValueError("start=weights is for a run that begins with weights: add checkpoint=SOURCE")
            if self.anchor.name != "none" or self.start.trainable != "all":
                key = "anchor" if self.anchor.name != "none" else "start.trainable"
                raise ValueError(f"{key} keeps what the start weights know: add checkpoint=SOURCE, or leave it out")
            if self.online.reference:
                raise ValueError(
                    "online.reference measures what the start weights knew and the run forgets: add checkpoint=SOURCE, "
                    "or leave it out"
                )
        if self.anchor.name == "l2sp" and self.start.lora_rank:
            raise ValueError("anchor=l2sp is for weights that change; with LoRA they do not: choose another anchor")
        if self.trainer.strategy == "fsdp" and (self.anchor.name != "none" or self.start.lora_rank):
            raise ValueError("trainer.strategy=fsdp supports neither an anchor nor LoRA: use trainer.strategy=ddp")
        return self

    @model_validator(mode="after")
    def _no_online_eval_with_fsdp(self) -> Self:
        if self.trainer.strategy == "fsdp" and self.online.every_epochs:
            raise ValueError("trainer.strategy=fsdp needs online.every_epochs=null: no process holds the whole model")
        return self


class BenchRunConfig(StrictConfig):
    name: str


class BenchDataConfig(PretrainDataConfig):
    root: Path | None  # type: ignore[assignment]


class BenchConfig(TrainingConfig):
    run: BenchRunConfig
    data: BenchDataConfig
    seconds: Positive
    compare_to: OverrideList
    row: Literal["full", "synthetic"]
    rounds: Count
    out: Path


class ExportConfig(ModelConfig):
    num_heads: Count | None
    dtype: Literal["float32", "float16"]
    overwrite: bool
    out: Path


class ShardDataConfig(StrictConfig):
    source: Literal["folder", "list"]
    root: Path


class ScanDataConfig(ShardDataConfig):
    range: ValueRangeField


class ScanConfig(StrictConfig):
    data: ScanDataConfig
    out: Path | None


class ShardConfig(StrictConfig):
    data: ShardDataConfig
    out: Path
    shard_mb: Positive


class DemoConfig(StrictConfig):
    seed: Seed
    run: RunDirConfig
    method: MethodName
    num_images: Annotated[int, Field(ge=200)]
    max_steps: Count
