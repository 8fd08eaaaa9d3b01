"""Base class and value types of the configuration: numbers with ranges, times, durations, intervals, lists."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

T = TypeVar("T")


class StrictConfig(BaseModel):
    """A section of the configuration: unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Duration:
    """A length of training in steps, epochs or percent of the run.

    >>> Duration.parse("2 epochs").steps(steps_per_epoch=50, total_steps=1000)
    100
    >>> Duration.parse("10%").steps(steps_per_epoch=50, total_steps=1000)
    100
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Parse `100 steps`, `1.5 epochs` or `10%` (of the whole run).

        Raises:
            ValueError: The text is none of these.
        """
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?(steps?|epochs?|%)", text.strip())
        if not match:
            raise ValueError("write a duration as 100steps, 1.5epochs or 10% (of the run)")
        return cls(float(match[1]), match[2].rstrip("s"))

    def __str__(self) -> str:
        return f"{self.value:.15g}%" if self.unit == "%" else f"{self.value:.15g} {self.unit}s"

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Return the duration in whole optimizer steps."""
        per_unit = {"step": 1.0, "epoch": float(steps_per_epoch), "%": total_steps / 100}[self.unit]
        return round(self.value * per_unit)


@dataclass(frozen=True)
class ValueRange:
    """Which values of images with more than 8 bits, signed values or floats become black and white.

    By the kind of values (`auto`), the same two values for all images, or two percentiles of each image.
    """

    low: float | None = None  # None: auto
    high: float | None = None
    percentiles: bool = False

    @classmethod
    def parse(cls, value: object) -> ValueRange:
        """Parse `auto`, `[0, 4095]` or `[1%, 99%]`.

        Raises:
            ValueError: It is none of these, or the first value is not the smaller one.
        """
        if isinstance(value, ValueRange):
            return value
        if value == "auto":
            return cls()
        parts = value if isinstance(value, list | tuple) else str(value).strip("[] ").split(",")
        texts = [str(part).strip() for part in parts]
        percentiles = all(text.endswith("%") for text in texts)
        try:
            low, high = (float(text.removesuffix("%") if percentiles else text) for text in texts)
        except ValueError:
            raise ValueError("write auto, [0, 4095] (values) or [1%, 99%] (percentiles of each image)") from None
        if not -math.inf < low < high < math.inf or (percentiles and not 0 <= low < high <= 100):
            raise ValueError("write the smaller value first; percentiles lie between 0% and 100%")
        return cls(low, high, percentiles)

    @property
    def is_auto(self) -> bool:
        """Whether the range is chosen by the kind of values."""
        return self.low is None

    def __str__(self) -> str:
        sign = "%" if self.percentiles else ""
        return "auto" if self.is_auto else f"[{self.low:.15g}{sign}, {self.high:.15g}{sign}]"


AUTO_RANGE = ValueRange()

Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _parse_time(value: object) -> object:
    """Convert `90s`, `20m`, `1.5h` or `2d` to a timedelta."""
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    if isinstance(value, str) and (match := re.fullmatch(r"([\d.]+) ?([smhd])", value.strip())):
        return timedelta(**{units[match[2]]: float(match[1])})
    if value is None or isinstance(value, timedelta):
        return value
    raise ValueError("write a time as 90s, 20m, 1.5h or 2d")


def _parse_duration(value: object) -> object:
    return value if isinstance(value, Duration) else Duration.parse(str(value))


def _check_resume(value: object) -> object:
    if value not in (True, False, "auto"):
        raise ValueError("write true, false or auto")
    return value


def _check_ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"write the smaller value first, as [{value[1]}, {value[0]}]")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _split_list(value: object) -> object:
    """Split `[a=1,b=[2,3]]`, which is text on the command line, at its outer commas."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    depth, items = 0, [""]
    for letter in inside:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return [item.strip() for item in items if item.strip()]


POSITIONAL = "positional"  # metadata of the key that takes the arguments without an equals sign
OneOrMore = Annotated[list[T], Field(min_length=1), BeforeValidator(_as_list)]  # k=5 is k=[5]
OverrideList = Annotated[list[str], BeforeValidator(_split_list)]
PathList = Annotated[list[Path], BeforeValidator(_split_list)]
WallTime = Annotated[timedelta, BeforeValidator(_parse_time), PlainSerializer(lambda t: f"{t.total_seconds():.15g}s")]
DurationField = Annotated[Duration, BeforeValidator(_parse_duration), PlainSerializer(str)]
ValueRangeField = Annotated[ValueRange, BeforeValidator(ValueRange.parse), PlainSerializer(str)]
Range = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_check_ascending)]
Ratio = Annotated[tuple[Positive, Positive], AfterValidator(_check_ascending)]
ResumeChoice = Annotated[bool | Literal["auto"], BeforeValidator(_check_resume)]
