"""The configuration keys of the commands that turn what a network sees into pictures and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssl_vit.config import Section, Which
from ssl_vit.config_evaluation import EvalDataConfig
from ssl_vit.config_values import Count, Seed


class ReportDataConfig(EvalDataConfig):
    @model_validator(mode="after")
    def _some_pictures(self) -> Self:  # a report does without labelled pictures
        return self

    @property
    def named(self) -> bool:
        """Whether there are any."""
        return self.root is not None or self.train is not None


class ReportConfig(Section):
    run: Path
    weights: Which
    data: ReportDataConfig
    features: Path | None
    images: Path | None
    masks: Path | None
    limit: Count
    max_side: Count | None
    mass: Annotated[float, Field(gt=0, lt=1)]
    k: Count
    points: Annotated[int, Field(ge=3, le=1000)]
    inspect: bool
    projection: Literal["pca", "tsne"]
    seed: Seed
    out: Path | None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.masks is not None and self.images is None:
            raise ValueError("masks needs the pictures that they belong to: images=FOLDER masks=FOLDER")
        if self.out is not None and self.out.suffix != ".html":
            raise ValueError(f"out={self.out}: the report is a page, name it .html")
        return self
