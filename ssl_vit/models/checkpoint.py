"""Load backbones: from runs, exported files, timm and official DINO and SiT files; all keys must match."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.config.types import AUTO_RANGE, ValueRange
from ssl_vit.models.backbone import Backbone, check_plain_vit
from ssl_vit.models.export import ModelDescription, file_sha256, load_safetensors, read_export
from ssl_vit.models.hub_weights import read_timm_config
from ssl_vit.models.lora import merge_lora
from ssl_vit.models.official_checkpoints import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LICENSES,
    convert_official_checkpoint,
    torch_load_weights_only,
)
from ssl_vit.models.strict_state import build_strictly
from ssl_vit.runtime.atomic_io import replaced_run_hint
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.shipped_files import weights_dir

CHECKPOINT_KEY = "ssl_vit"  # entry in a Lightning checkpoint with method, backbone and normalization
LAST = "last.ckpt"  # everything that is needed to resume a run
START_WEIGHTS = "start.safetensors"  # in a run directory: its backbone before the first step, if that was not random

Weights = Literal["teacher", "student"]
Positions = Literal["timm", "official"]

# Raised by values of a wrong kind, shape or size in a file.
_MISFIT = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError)


class LoadedBackbone(NamedTuple):
    """Frozen backbone in evaluation mode, with its normalization and source."""

    backbone: Backbone
    mean: list[float]  # normalization of the training, per channel
    std: list[float]
    source: str
    sha256: str | None  # of the file, if there is one
    run: Path | None  # run directory that the file is in
    weights: str | None = None  # teacher or student, if stored in the file
    epoch: int | None = None  # of the training, if stored in the file
    step: int | None = None
    value_range: ValueRange = AUTO_RANGE  # that the images of the training were decoded with


def load_backbone(
    checkpoint: str | Path,
    weights: Weights = "teacher",
    *,
    require_cls: bool = True,
    num_heads: int | None = None,
    positions: Positions = "timm",
) -> LoadedBackbone:
    """Load a backbone.

    Args:
        checkpoint: A run directory, a `.ckpt`, an exported `.safetensors`, an official file, `timm:<model>`,
            `recipe:<name>` for weights that travel with the package, or `random:<any of these, or a timm name>` for the
            same architecture with random weights.
        weights: Teacher or student, if the file contains both.
        require_cls: Refuse models without a pooled class token.
        num_heads: Number of attention heads, for files that do not tell it.
        positions: Interpolation of the position embeddings at other image sizes: timm's, or that of DINO's code.

    Raises:
        UserError: There is no such file or model, the file is none of these, its keys do not match exactly, or it has
            no class token although one is required.
    """
    loaded = _load(str(checkpoint), weights, num_heads)
    if weights == "student" and loaded.weights != "student" and not str(checkpoint).startswith("random:"):
        raise UserError(f"checkpoint={checkpoint}: it does not tell of student weights; leave out weights=student")
    if require_cls:
        loaded.backbone.require_cls()
    if positions == "official":
        loaded.backbone.use_official_positions()
    return loaded


def _load(checkpoint: str, weights: Weights, num_heads: int | None) -> LoadedBackbone:
    kind, _, name = checkpoint.partition(":")
    if kind == "timm":
        return _from_timm(name, checkpoint, pretrained=True)
    if kind == "recipe":
        return _from_recipe(name)
    if kind == "random":
        like = (
            _from_timm(name, checkpoint, pretrained=False) if timm.is_model(name) else _load(name, "teacher", num_heads)
        )
        return random_init_like(like, seed=0)
    path = _file_of(Path(checkpoint))
    try:
        return _from_file(path, weights, num_heads)
    except UserError:
        raise
    except _MISFIT as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"checkpoint={path}: the file contains no valid backbone ({reason})") from None


def load_start_of_run(loaded: LoadedBackbone, *, positions: Positions = "timm") -> LoadedBackbone | None:
    """Return the weights that the run of a backbone started from; None if these were random, or it is of no run.

    Raises:
        UserError: The file is damaged.
    """
    if loaded.run is None or not (loaded.run / START_WEIGHTS).is_file():
        return None
    return load_backbone(loaded.run / START_WEIGHTS, require_cls=False, positions=positions)


def random_init_like(loaded: LoadedBackbone, seed: int) -> LoadedBackbone:
    """Return the same architecture with random weights, the baseline of every score."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Backbone(loaded.backbone.config)
    if loaded.backbone.positions == "official":
        backbone.use_official_positions()
    source = f"random weights, seed {seed}"
    backbone.requires_grad_(False).eval()
    random = LoadedBackbone(backbone, loaded.mean, loaded.std, source, sha256=None, run=None)
    return random._replace(value_range=loaded.value_range)


def _file_of(path: Path) -> Path:
    """Return the file to read: in a run directory the last checkpoint, else the exported backbone."""
    candidates = [path / "checkpoints" / LAST, path / "backbone.safetensors"] if path.is_dir() else [path]
    if found := next((candidate for candidate in candidates if candidate.is_file()), None):
        return found
    if path.is_dir():
        raise UserError(
            f"checkpoint={path}: no checkpoints/last.ckpt and no backbone.safetensors in this directory"
            + replaced_run_hint(path)
        )
    hint = f"; timm models are written as timm:{path}" if timm.is_model(str(path)) else _name_nearby(path)
    raise UserError(f"checkpoint={path}: there is no such file or folder{replaced_run_hint(path) or hint}")


def _name_nearby(path: Path) -> str:
    """Name up to three runs and checkpoints in the nearest folder that exists, and in `runs` there, as a hint."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    found = [
        str(entry)
        for entry in (*folder.glob("*"), *folder.glob("runs/*"))
        if entry.suffix in (".ckpt", ".safetensors", ".pth") or (entry / "config.yaml").is_file()
    ]
    nearest = sorted(found, key=lambda name: SequenceMatcher(None, str(path), name).ratio(), reverse=True)[:3]
    return f"; near it: {', '.join(nearest)}" if nearest else ""


def _from_file(path: Path, weights: Weights, num_heads: int | None) -> LoadedBackbone:
    if path.suffix == ".safetensors" and not path.with_suffix(".json").is_file():
        return _from_hub(path, weights, num_heads)
    if path.suffix == ".safetensors":
        description, state, sha256 = read_export(path)
        backbone = build_strictly(description.backbone, state, f"checkpoint={path}")
        run = path.parent if (path.parent / "config.yaml").is_file() else None
        loaded = LoadedBackbone(backbone, description.mean, description.std, str(path), sha256, run)
        return loaded._replace(value_range=description.value_range)
    content = torch_load_weights_only(path)
    if CHECKPOINT_KEY in content:
        return _from_lightning_checkpoint(content, path, weights)
    return _from_official(content, path, weights, num_heads)


def _from_hub(path: Path, weights: Weights, num_heads: int | None) -> LoadedBackbone:
    """Load weights without our JSON file: by timm's `config.json` beside them, else as an official file."""
    state = load_safetensors(path)
    description = read_timm_config(path)
    if description is None:
        try:
            return _from_official(dict(state), path, weights, num_heads)
        except UserError as error:
            missing = f"{path.with_suffix('.json').name} of `ssl-vit export`, or timm's config.json"
            raise UserError(f"{error}; beside the file {missing}, is missing") from None
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    backbone = build_strictly(description.backbone, state, f"checkpoint={path}")
    source = f"{path} ({description.backbone.name}, as in config.json)"
    return LoadedBackbone(backbone, description.mean, description.std, source, file_sha256(path), None)


def _from_recipe(name: str) -> LoadedBackbone:
    """Load the weights that a recipe has trained and that travel with the package."""
    path = weights_dir() / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(f"recipe:{file.stem}" for file in weights_dir().glob("*.safetensors")))
        raise UserError(f"checkpoint=recipe:{name}: there are no such weights; there are {there}")
    return _from_file(path, "teacher", None)._replace(source=f"recipe:{name}")


def _from_timm(name: str, origin: str, *, pretrained: bool) -> LoadedBackbone:
    if not timm.is_model(name):
        raise UserError(f"checkpoint={origin}: timm has no model {name}; `timm.list_models()` lists them")
    try:
        settings = timm.get_pretrained_cfg(name)
        with torch.device("meta"):  # the architecture alone, so that nothing is downloaded for models that are refused
            architecture = timm.create_model(name, num_classes=0)
        check_plain_vit(architecture, f"checkpoint={origin}: {name}")
        plain = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"checkpoint={origin} cannot be loaded: {error}") from None
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
    backbone = build_strictly(config, plain.state_dict(), f"checkpoint={origin}")
    return LoadedBackbone(backbone, list(settings.mean), list(settings.std), origin, None, None)


def load_method_state(checkpoint: str) -> dict[str, Any]:
    """Return the entry `method` and the `state_dict` of a run's checkpoint; empty if the source is something else.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    if checkpoint.partition(":")[0] in ("timm", "random", "recipe"):
        return {}
    path = _file_of(Path(checkpoint))
    if path.suffix == ".safetensors":
        return {}
    content = torch_load_weights_only(path)
    entry = content.get(CHECKPOINT_KEY)
    return {"method": entry["method"], "state_dict": content["state_dict"]} if entry else {}


def _from_lightning_checkpoint(content: dict[str, Any], path: Path, weights: Weights) -> LoadedBackbone:
    entry = content[CHECKPOINT_KEY]
    description = ModelDescription(**{name: entry[name] for name in ModelDescription.model_fields if name in entry})
    state = merge_lora(content["state_dict"])
    which = weights if any(key.startswith(f"{weights}.") for key in state) else "student"
    prefix = f"{which}.backbone.vit."
    backbone = build_strictly(
        description.backbone,
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
        f"checkpoint={path} ({which})",
    )
    run = path.parent.parent if path.parent.name == "checkpoints" else None
    source = f"{path} ({which})"
    loaded = LoadedBackbone(backbone, description.mean, description.std, source, file_sha256(path), run)
    loaded = loaded._replace(weights=which, value_range=description.value_range)
    return loaded._replace(epoch=_count(content, "epoch"), step=_count(content, "global_step"))


def _from_official(content: dict[str, Any], path: Path, weights: Weights, num_heads: int | None) -> LoadedBackbone:
    family, config, state, which = convert_official_checkpoint(content, weights, path, num_heads)
    backbone = build_strictly(config, state, f"checkpoint={path}")
    assumed = f"as in {family}" if num_heads is None else "given; normalization as in DINO, assumed"
    source = f"{path} ({which}; {config.num_heads} attention heads, {assumed}; the file does not tell)"
    source += f"; {LICENSES[family]}" if family in LICENSES else ""
    loaded = LoadedBackbone(backbone, IMAGENET_MEAN, IMAGENET_STD, source, file_sha256(path), None)
    named = which if which in ("teacher", "student") else None
    return loaded._replace(weights=named, epoch=_count(content, "epoch"))


def _count(content: dict[str, Any], key: str) -> int | None:
    value = content.get(key)
    return value if isinstance(value, int) else None


def set_epoch_counts(checkpoint: dict[str, Any], step: int, steps_per_epoch: int) -> None:
    """Set the epoch counts of a Lightning checkpoint after `step` optimizer steps, from which they follow.

    Resumed at the end of an epoch, Lightning 2.6 counts the next one as not started, and a checkpoint at its end would
    repeat it.
    """
    epoch = (step - 1) // steps_per_epoch  # of the last step
    counts = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress.update(counts)
