"""Weights in and out: our checkpoints, exported files, timm names, the official DINO and SiT files; always strict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import timm
import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.config.types import Positive, StrictConfig
from ssl_vit.models.backbone import UNSUPPORTED_MESSAGE, Backbone, timm_kwargs
from ssl_vit.models.official_checkpoints import IMAGENET_MEAN, IMAGENET_STD, convert_official_checkpoint
from ssl_vit.models.torch_load import torch_load_weights_only
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import UserError

Weights = Literal["teacher", "student"]
StateDict = Mapping[str, Tensor]

CHECKPOINT_KEY = "ssl_vit"  # our entry in a Lightning checkpoint

LAST = "last.ckpt"  # of a run: everything that resuming needs


# What values of the wrong kind, shape or size in a file have been seen to provoke.
_MISFIT = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError)


class _About(StrictConfig):
    """What a file says of its backbone."""

    backbone: BackboneConfig
    mean: list[float]
    std: list[Positive]

    @model_validator(mode="after")
    def _channels_agree(self) -> Self:
        if not len(self.mean) == len(self.std) == self.backbone.in_chans:
            raise ValueError("mean and std need a number for each channel")
        return self


class LoadedBackbone(NamedTuple):
    """A frozen backbone in evaluation mode and where it came from."""

    backbone: Backbone
    mean: list[float]  # the normalization that it was trained with, per channel
    std: list[float]
    source: str
    sha256: str | None  # of the file; None for weights that came from none
    run: Path | None  # the run folder, where the weights belong to one
    weights: str | None = None  # teacher or student, where the file says so
    epoch: int | None = None  # that the training had reached, where the file says so
    step: int | None = None


def load_backbone(checkpoint: str | Path, weights: Weights = "teacher", *, require_cls: bool = True) -> LoadedBackbone:
    """Load a run folder, a `.ckpt`, an exported `.safetensors`, `timm:<model>`, `random:<model>`, or an official file.

    `weights` chooses between teacher and student where the file holds both. `random:` takes a timm name or anything
    else that can be loaded, and gives that architecture random weights.

    Raises:
        UserError: There is no such file or model, the file is none of these, its keys do not fit exactly, or there is
            no class token where one is needed.
    """
    loaded = _load(str(checkpoint), weights)
    if require_cls:
        loaded.backbone.require_cls()
    return loaded


def _load(checkpoint: str, weights: Weights) -> LoadedBackbone:
    kind, _, name = checkpoint.partition(":")
    if kind == "timm":
        return _from_timm(name, pretrained=True)
    if kind == "random":
        return random_init_like(
            _from_timm(name, pretrained=False) if timm.is_model(name) else _load(name, "teacher"), seed=0
        )
    path = _file_of(Path(checkpoint))
    try:
        return _from_file(path, weights)
    except UserError:
        raise
    except _MISFIT as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"checkpoint={path}: what it holds makes no backbone ({reason})") from None


def random_init_like(loaded: LoadedBackbone, seed: int) -> LoadedBackbone:
    """The same architecture with random weights, the baseline beside every score."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = Backbone(loaded.backbone.config)
    source = f"random weights, seed {seed}"
    return LoadedBackbone(_frozen(twin), loaded.mean, loaded.std, source, sha256=None, run=None)


def export_backbone(backbone: Backbone, path: Path, *, mean: list[float], std: list[float], source: str) -> None:
    """Write the weights under timm's names, and beside them a JSON that says how to load them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.vit.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(state))
    config = backbone.config
    arguments = ", ".join(f"{name}={value!r}" for name, value in timm_kwargs(config).items())
    sidecar = {
        "load": [
            f'model = timm.create_model("{config.name}", {arguments})',
            f'model.load_state_dict(safetensors.torch.load_file("{path.name}"))',
        ],
        "normalization": {"mean": mean, "std": std},
        "features": "model.forward_features(images)[:, 0] is the [CLS] token after the final norm",
        "source": source,
        "backbone": config.model_dump(mode="json"),
        "sha256": _sha256(path),
    }
    write_json(path.with_suffix(".json"), sidecar)


def _build_and_load(config: BackboneConfig, state: StateDict, origin: str) -> Backbone:
    """The frozen backbone with timm-named weights, of which every key and shape must fit.

    A file may claim any sizes: memory is taken only once it has been compared with what the file holds.

    Raises:
        UserError: Naming the keys that are missing, left over, or of another shape.
    """
    with torch.device("meta"):
        _check_state_dict(Backbone(config), state, origin)
    backbone = Backbone(config)
    backbone.vit.load_state_dict(dict(state))
    return _frozen(backbone)


def _check_state_dict(backbone: Backbone, state: StateDict, origin: str) -> None:
    wanted = backbone.vit.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    left_over = sorted(state.keys() - wanted.keys())
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    problems = {"missing": missing, "left over": left_over, "of another shape": sorted(misshaped)}
    if any(problems.values()):
        lines = [f"  {what}: {_shortened(keys)}" for what, keys in problems.items() if keys]
        raise UserError("\n".join([f"{origin} does not fit {backbone.config.name}", *lines]))


def _shortened(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _frozen(backbone: Backbone) -> Backbone:
    return backbone.requires_grad_(False).eval()


def _file_of(path: Path) -> Path:
    """The file to read: in a run folder the last checkpoint, else the exported backbone."""
    candidates = [path / "checkpoints" / LAST, path / "backbone.safetensors"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"checkpoint={path}: no checkpoints/last.ckpt and no backbone.safetensors in this folder")
    raise UserError(
        f"checkpoint={path}: there is no such file or folder; timm models are named as timm:{path}"
        if timm.is_model(str(path))
        else f"checkpoint={path}: there is no such file or folder"
    )


def _from_file(path: Path, weights: Weights) -> LoadedBackbone:
    if path.suffix == ".safetensors":
        return _from_export(path)
    content = torch_load_weights_only(path)
    if CHECKPOINT_KEY in content:
        return _from_lightning_checkpoint(content, path, weights)
    return _from_official(content, path, weights)


def _from_timm(name: str, *, pretrained: bool) -> LoadedBackbone:
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name}; `timm.list_models()` names them")
    try:
        settings = timm.get_pretrained_cfg(name)
        with torch.device("meta"):  # the architecture alone: nothing is fetched for what is then refused
            architecture = timm.create_model(name, num_classes=0)
        if type(architecture) is not VisionTransformer or type(architecture.patch_embed) is not PatchEmbed:
            raise UserError(f"timm:{name} is {UNSUPPORTED_MESSAGE}")
        plain = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"timm:{name} cannot be loaded here: {error}") from None
    config = BackboneConfig(
        name=name,
        img_size=settings.input_size[-1],
        patch_size=plain.patch_embed.patch_size[0],
        in_chans=settings.input_size[0],
        reg_tokens=plain.num_reg_tokens,
        drop_path=0.0,
        embed_dim=None,
        depth=None,
        num_heads=None,
        init="timm",
    )
    backbone = _build_and_load(config, plain.state_dict(), f"timm:{name}")
    return LoadedBackbone(backbone, list(settings.mean), list(settings.std), f"timm:{name}", None, None)


def _from_export(path: Path) -> LoadedBackbone:
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.is_file():
        raise UserError(f"checkpoint={path}: {sidecar_path.name} is missing; it says which model the weights are of")
    try:
        sidecar = json.loads(sidecar_path.read_text(encoding="utf-8"))
        about = _About(backbone=sidecar["backbone"], **sidecar["normalization"])
    except (ValueError, LookupError, TypeError, RecursionError):  # no JSON, or one of another tool
        raise UserError(f"checkpoint={path}: {sidecar_path.name} is not what `ssl-vit export` writes") from None
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"checkpoint={path}: a damaged safetensors file: {error}") from None
    backbone = _build_and_load(about.backbone, state, f"checkpoint={path}")
    run = path.parent if (path.parent / "config.yaml").is_file() else None
    return LoadedBackbone(backbone, about.mean, about.std, str(path), _sha256(path), run)


def _from_lightning_checkpoint(content: dict[str, Any], path: Path, weights: Weights) -> LoadedBackbone:
    entry = content[CHECKPOINT_KEY]
    about = _About(**{name: entry[name] for name in _About.model_fields})
    state = content["state_dict"]
    which = weights if any(key.startswith(f"{weights}.") for key in state) else "student"
    prefix = f"{which}.backbone.vit."
    backbone = _build_and_load(
        about.backbone,
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
        f"checkpoint={path} ({which})",
    )
    run = path.parent.parent if path.parent.name == "checkpoints" else None
    loaded = LoadedBackbone(backbone, about.mean, about.std, f"{path} ({which})", _sha256(path), run)
    return loaded._replace(weights=which, epoch=_count(content, "epoch"), step=_count(content, "global_step"))


def _from_official(content: dict[str, Any], path: Path, weights: Weights) -> LoadedBackbone:
    config, state, which = convert_official_checkpoint(content, weights, f"checkpoint={path}")
    backbone = _build_and_load(config, state, f"checkpoint={path}")
    source = f"{path} ({which}; {config.num_heads} attention heads of width 64, which the file does not say)"
    loaded = LoadedBackbone(backbone, IMAGENET_MEAN, IMAGENET_STD, source, _sha256(path), None)
    named = which if which in ("teacher", "student") else None
    return loaded._replace(weights=named, epoch=_count(content, "epoch"))


def _count(content: dict[str, Any], key: str) -> int | None:
    value = content.get(key)
    return value if isinstance(value, int) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
