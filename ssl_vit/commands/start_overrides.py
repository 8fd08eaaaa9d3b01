"""What `checkpoint=` changes in the configuration of a training: the preset, the architecture, the normalization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_vit.config.methods import METHOD_CONFIGS
from ssl_vit.config.types import AUTO_RANGE
from ssl_vit.models.checkpoint import load_backbone, load_method_state
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.resume_checks import CONFIG, read_config

_TRAINING_KEYS = ("drop_path", "init")  # of the section `backbone`: not of the checkpoint, but of this training


def start_overrides(values: dict[str, Any], argv: Sequence[str], presets: Path) -> list[str]:
    """Return the overrides that a configuration with a checkpoint gets before those of the user.

    They win over a recipe, whose learning rates are for random weights; a recipe that selects a preset itself wins over
    its own. Of a run that is resumed they are those of its start, so that its source may be gone.

    Args:
        values: The composed configuration, with `checkpoint`.
        argv: The user's overrides.
        presets: The folder `conf/start`.

    Raises:
        UserError: The checkpoint cannot be loaded, or the user names another architecture.
    """
    chosen = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    if "backbone" in chosen:
        raise UserError(
            f"backbone={chosen['backbone']}: checkpoint={values['checkpoint']} brings its own architecture, so leave "
            "out backbone="
        )
    backbone, views, value_range = _of_run(values) or _of_checkpoint(values)
    overrides = [f"backbone.{key}={'null' if value is None else value}" for key, value in backbone.items()]
    overrides += [f"method.views.{key}={value}" for key, value in views.items()]
    overrides.append(f"data.range={value_range}")
    if chosen.get("start") == "weights" or (values["start"]["name"] == "scratch" and "start" not in chosen):
        overrides.insert(0, f"+start@_global_={_preset_of(values['method']['name'], presets)}")
    return overrides


def _of_run(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str] | None:
    """Return architecture, normalization and range of values of the run that may be resumed, or None."""
    folder = Path(str(values["run"]["folder"])) / str(values["run"]["name"])
    if values["run"]["overwrite"] or not (folder / CONFIG).is_file():
        return None
    config = read_config(folder)
    views = {key: config["method"]["views"][key] for key in ("mean", "std")}
    return _architecture(config["backbone"]), views, str(config["data"].get("range", AUTO_RANGE))


def _of_checkpoint(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    source, method = str(values["checkpoint"]), values["method"]
    loaded = load_backbone(source, values["weights"], require_cls=False)
    backbone = _architecture(loaded.backbone.config.model_dump())
    if load_method_state(source).get("method") == method["name"]:  # which adds its own registers again
        backbone["reg_tokens"] -= METHOD_CONFIGS[method["name"]].model_validate(method).own_registers
    return backbone, {"mean": loaded.mean, "std": loaded.std}, str(loaded.value_range)


def _architecture(backbone: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in backbone.items() if key not in _TRAINING_KEYS}


def _preset_of(method: str, presets: Path) -> str:
    """Return the preset for weights: that of the method, if it has one."""
    return f"weights_{method}" if (presets / f"weights_{method}.yaml").is_file() else "weights"
