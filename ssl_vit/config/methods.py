"""The configuration section `method`: views, optimizer, and the keys of each method."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from ssl_vit.config.types import (
    Count,
    Duration,
    DurationField,
    NonNegative,
    Positive,
    Probability,
    Range,
    Ratio,
    StrictConfig,
)


class CropsConfig(StrictConfig):
    count: Annotated[int, Field(ge=0)]
    size: Count
    scale: Range
    ratio: Ratio


class JitterConfig(StrictConfig):
    p: Probability
    brightness: NonNegative
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Field(ge=0, le=0.5)]


class BlurConfig(StrictConfig):
    p: tuple[Probability, Probability, Probability]
    sigma: Range


class ViewsConfig(StrictConfig):
    global_crops: CropsConfig
    local_crops: CropsConfig
    flip: Probability
    jitter: JitterConfig
    grayscale: Probability
    blur: BlurConfig
    solarize: tuple[Probability, Probability, Probability]
    mean: list[float]
    std: list[Positive]


class OptimizerConfig(StrictConfig):
    lr: Positive
    lr_batch_size: Count
    min_lr: NonNegative
    warmup: DurationField
    weight_decay: tuple[NonNegative, NonNegative]
    betas: tuple[Probability, Probability]
    grad_clip: NonNegative


class TeacherConfig(StrictConfig):
    momentum: tuple[Probability, Probability]
    half_life: DurationField | None
    temperature: Positive
    warmup_temperature: Positive
    warmup: DurationField
    center_momentum: Probability


class MethodConfig(StrictConfig):
    """Section `method`: the keys of every method, and the properties that other sections depend on."""

    title: ClassVar[str]  # name in reports

    name: str
    views: ViewsConfig
    optimizer: OptimizerConfig

    @property
    def batch_multiple(self) -> int:
        """Number of images that a process's micro-batch must be a multiple of when there are several processes."""
        return 1

    @property
    def depends_on_num_processes(self) -> bool:
        """Whether another number of processes changes the loss."""
        return False

    @property
    def own_registers(self) -> int:
        """Number of registers that the method adds to those of the backbone."""
        return 0

    def without_first_epochs(self) -> Self:
        """Return the section without what only the first epochs do, for a benchmark."""
        return self


class DINOHeadConfig(StrictConfig):
    prototypes: Annotated[int, Field(ge=2)]
    hidden_dim: Count
    bottleneck_dim: Count
    layers: Count
    norm_last_layer: bool


class DINOConfig(MethodConfig):
    title = "DINO"

    name: Literal["dino"]
    head: DINOHeadConfig
    teacher: TeacherConfig
    student_temperature: Positive
    freeze_last_layer: DurationField

    def without_first_epochs(self) -> Self:
        """Return the section with prototypes that are never frozen."""
        return self.model_copy(update={"freeze_last_layer": Duration.parse("0steps")})

    @model_validator(mode="after")
    def _two_global_views(self) -> Self:
        if self.views.global_crops.count != 2:
            raise ValueError("views.global_crops.count must be 2: DINO compares two global views")
        return self


class RotationConfig(StrictConfig):
    enabled: bool
    weight: NonNegative


class ContrastiveConfig(StrictConfig):
    enabled: bool
    weight: NonNegative
    dim: Count
    head: Literal["linear", "mlp"]
    hidden_dim: Count
    temperature: Positive
    gather: bool


class ReconstructionConfig(StrictConfig):
    enabled: bool
    weight: NonNegative
    loss_on: Literal["all", "corrupted"]


class CorruptionBlocksConfig(StrictConfig):
    p: Probability
    max_area: Probability
    size: Range


class CorruptionConfig(StrictConfig):
    gray: Probability
    blur: Probability
    noise: CorruptionBlocksConfig
    replace: CorruptionBlocksConfig


class SiTConfig(MethodConfig):
    title = "SiT"

    name: Literal["sit"]
    tokens: Literal["dedicated", "shared"]
    rotation: RotationConfig
    contrastive: ContrastiveConfig
    reconstruction: ReconstructionConfig
    weighting: Literal["uncertainty", "fixed"]
    corruption: CorruptionConfig

    @property
    def own_registers(self) -> int:
        """1 if the rotation is predicted from a token of its own."""
        return int(self.rotation.enabled and self.tokens == "dedicated")

    @property
    def batch_multiple(self) -> int:
        """4 if images replace blocks of each other, which they do in groups of four."""
        return 4 if self.corruption.replace.p > 0 else 1

    @property
    def depends_on_num_processes(self) -> bool:
        """Whether the negatives of the contrastive loss are those of one process."""
        return not self.contrastive.gather

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not (self.rotation.enabled or self.contrastive.enabled or self.reconstruction.enabled):
            raise ValueError("enable at least one of rotation, contrastive, reconstruction")
        if self.views.global_crops.count != 2 or self.views.local_crops.count != 0:
            raise ValueError("SiT works on two global views: views.global_crops.count=2 views.local_crops.count=0")
        return self


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {"dino": DINOConfig, "sit": SiTConfig}


def _check_method_name(name: str) -> str:
    if name not in METHOD_CONFIGS:
        raise ValueError(f"choose one of {', '.join(METHOD_CONFIGS)}")
    return name


def _select_config(value: object) -> object:
    """Return the section as the config class that its key `name` selects."""
    if not isinstance(value, dict):
        return value
    config_class = METHOD_CONFIGS.get(str(value.get("name")))
    if config_class is None:
        raise ValueError(f"method.name={value.get('name')!r}: choose one of {', '.join(METHOD_CONFIGS)}")
    return config_class.model_validate(value)


MethodName = Annotated[str, AfterValidator(_check_method_name)]
SelectedMethodConfig = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_select_config)]
