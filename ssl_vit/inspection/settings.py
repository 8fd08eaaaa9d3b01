"""What a finished run says of how it saw its pictures: the part of its `config.yaml` that inspection needs."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ConfigDict, ValidationError

from ssl_vit.config import BackboneConfig, MethodConfig, Section, Source
from ssl_vit.config_values import Count, Seed
from ssl_vit.errors import UserError


class SeenData(Section):
    """Of the section `data`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Source
    root: Path
    batch_size: Count


class RunSettings(Section):
    """Of a pretraining run, by any version of this package: keys that are not named here may be there or not."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: Seed
    data: SeenData
    backbone: BackboneConfig
    method: MethodConfig


def run_settings(run: Path) -> RunSettings:
    """Of the run in a folder.

    Raises:
        UserError: There is no `config.yaml` of a pretraining run in it, or it is damaged.
    """
    path = run / "config.yaml"
    try:
        return RunSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run") from None
    except (ValidationError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path} is damaged, or not of a pretraining run") from None
