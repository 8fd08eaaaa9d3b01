"""`ssl-vit inspect`: what is inside a vision transformer, as panels, arrays and numbers.

ssl-vit inspect checkpoint=runs/photos
ssl-vit inspect checkpoint=timm:vit_small_patch16_224.dino images=photos out=inspect
ssl-vit inspect checkpoint=runs/photos images=photos versus=timm:vit_small_patch16_224.dino limit=1000
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.attention.summary import NETWORK, RANDOM
from ssl_vit.commands.run_panels import reconstruction_panel, views_panel
from ssl_vit.config_pictures import InspectConfig
from ssl_vit.data.files import pictures_at
from ssl_vit.data.find import find_pictures
from ssl_vit.data.pictures import BrokenPicture, Pictures, SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.inspection.files import INDEX, write_findings
from ssl_vit.inspection.findings import Findings, of_attention, of_features, of_layers, of_weights
from ssl_vit.inspection.observer import Observer
from ssl_vit.inspection.panel import Panel
from ssl_vit.inspection.similarity import LinearCKA
from ssl_vit.models.weights import LoadedBackbone, load_backbone, random_twin
from ssl_vit.records import provenance
from ssl_vit.records.naming import model_name
from ssl_vit.training.hardware import best_device
from ssl_vit.training.runs import CONFIG, read_config

TWIN = 2**20  # far from any seed that a run starts from: with its first weights a twin would look like the network
DRAWN = 4  # pictures
BATCH_PIXELS = 2**20  # of crops in one forward pass
_DIVERGED = "Training has diverged: take an earlier checkpoint"
NEED_PICTURES = ("rollout", "distance", "entropy", "prefix", "diversity", "norms", "spectrum", "layers")


class Outcome(NamedTuple):
    """What one run of the command did."""

    out: Path
    panels: int
    pictures: int
    skipped: int
    left_out: dict[str, str]
    seconds: float


def main(config: InspectConfig) -> None:
    """Run the command."""
    outcome = inspect(config)
    print(f"{outcome.panels} panels of {outcome.pictures:,} pictures in {outcome.seconds:.0f} s: {outcome.out / INDEX}")
    for why in dict.fromkeys(outcome.left_out.values()):
        print(f"no panel {', '.join(name for name, reason in outcome.left_out.items() if reason == why)}: {why}")
    if outcome.skipped:
        print(f"{outcome.skipped} pictures could not be used: {outcome.out / 'skipped.txt'} says why")


def inspect(config: InspectConfig) -> Outcome:
    """Write panels, arrays and `inspect.json` into the folder.

    Raises:
        UserError: A network cannot be loaded or has diverged, there is no picture where some were named, or none that
            can be read.
    """
    start = time.perf_counter()
    networks = {NETWORK: _load(config.checkpoint, config)}
    if config.baselines:
        networks[RANDOM] = random_twin(networks[NETWORK], config.seed + TWIN)
    pictures = _pictures(config, networks[NETWORK].run)
    out = config.out or (networks[NETWORK].run or Path()) / "inspect"
    _check_apart(out, config.images)
    out.mkdir(parents=True, exist_ok=True)
    skipped = SkippedPictures(out / "skipped.txt")
    skipped.path.unlink(missing_ok=True)
    found, count = Findings.none(), 0
    if pictures is None:
        needing = [*NEED_PICTURES, *(["versus"] if config.versus else [])]
        found.left_out.update(dict.fromkeys(needing, "no pictures: name some with images=FOLDER"))
    else:
        found, count = _of_pictures(config, pictures, networks, skipped)
    found.add(of_weights(networks))
    if run := networks[NETWORK].run:
        found.add(_of_run(Path(config.checkpoint), run))
    data = None if pictures is None else {"text": pictures.describe(), "fingerprint": pictures.fingerprint(sizes=True)}
    device = best_device()
    about = {
        "model": provenance.network(networks[NETWORK], config.checkpoint, config.weights),
        "versus": config.versus,
        "data": {"n": count, "skipped": skipped.count(), "pictures": data},
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "cost": provenance.cost(start, device),
        "environment": {**provenance.environment(device), "forward": "float32"},
        "tool": provenance.tool(),
    }
    write_findings(out, found, about)
    return Outcome(out, len(found.panels), count, skipped.count(), found.left_out, time.perf_counter() - start)


def _load(checkpoint: str, config: InspectConfig) -> LoadedBackbone:
    loaded = load_backbone(checkpoint, config.weights, cls_needed=False)
    if not all(values.isfinite().all() for values in loaded.backbone.parameters()):
        raise UserError(f"{loaded.source}: its weights are not finite. {_DIVERGED}")
    return loaded


def _pictures(config: InspectConfig, run: Path | None) -> Pictures | None:
    """Those that were named; else those of the run, if it says which and they are still there."""
    if config.images is not None:
        return pictures_at(config.images)
    if run is None or not (run / CONFIG).is_file():
        return None
    data = read_config(run)["data"]
    root = data.get("root") or data.get("train")
    return find_pictures(data["source"], Path(root)) if root and Path(root).exists() else None


def _check_apart(out: Path, images: Path | None) -> None:
    if images is not None and out.absolute().is_relative_to(images.absolute()):
        raise UserError(f"out={out} lies inside images={images}: choose a folder outside of it")


def _of_pictures(
    config: InspectConfig, pictures: Pictures, networks: dict[str, LoadedBackbone], skipped: SkippedPictures
) -> tuple[Findings, int]:
    """All that needs pictures, and how many there were."""
    other = None
    watched = dict(networks)
    if config.versus is not None:
        loaded = _load(config.versus, config)
        other = model_name(loaded, config.versus, config.weights)
        other = f"{other} (versus)" if other in networks else other
        watched[other] = loaded
    for loaded in watched.values():
        loaded.backbone.to(best_device())
    observers = {name: Observer(loaded, config.image_size) for name, loaded in watched.items()}
    similarity = LinearCKA()
    count = 0
    for crops in _batches(config, pictures, observers, skipped):
        drawn = max(0, DRAWN - count)
        count += len(next(iter(crops.values())))
        layers = [layer for name, observer in observers.items() for layer in observer.see(crops[name], drawn=drawn)]
        similarity.add(layers)
    if not count:
        raise UserError(f"no picture could be used; {skipped.path} says why")
    seen = {name: observers[name].observation() for name in networks}
    if not seen[NETWORK].features.isfinite().all():
        raise UserError(f"{networks[NETWORK].source}: its features are not finite. {_DIVERGED}")
    found = of_attention(observers, seen)
    found.add(of_features(observers, seen))
    depths = {name: observer.depth for name, observer in observers.items()}
    found.add(of_layers(similarity.result(), depths, other, count))
    return found, count


def _of_run(checkpoint: Path, run: Path) -> Findings:
    """The views that it trained on, and what a SiT network restores."""
    found = Findings.none()
    drawings: dict[str, Callable[[], Panel | None]] = {
        "views": partial(views_panel, run),
        "reconstruction": partial(reconstruction_panel, run, checkpoint if checkpoint.is_file() else None),
    }
    for name, make in drawings.items():
        try:
            panel = make()
        except UserError as reason:
            found.left_out[name] = str(reason)
            continue
        if panel is not None:
            found.panels[name] = panel
    return found


def _batches(
    config: InspectConfig, pictures: Pictures, observers: dict[str, Observer], skipped: SkippedPictures
) -> Iterator[dict[str, Tensor]]:
    """The same pictures as every network takes them, (B, C, S, S) uint8 by network."""
    generator = torch.Generator().manual_seed(config.seed)
    places = torch.randperm(len(pictures), generator=generator)[: config.limit].tolist()
    size = max(1, BATCH_PIXELS // max(observer.cut.image_size for observer in observers.values()) ** 2)
    waiting: list[dict[str, Tensor]] = []
    given = 0
    for place in tqdm(places, unit=" pictures", desc="inspect"):
        try:
            waiting.append(_crops(pictures, place, observers))
        except BrokenPicture as broken:
            skipped.record(broken)
        if waiting and (len(waiting) == size or given < DRAWN):  # of a drawn picture more is held in memory: alone
            yield _stacked(waiting)
            given += len(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _crops(pictures: Pictures, place: int, observers: dict[str, Observer]) -> dict[str, Tensor]:
    channels = {observer.backbone.config.in_chans for observer in observers.values()}
    read = {count: pictures.read(place, count) for count in channels}
    return {name: observer.cut(read[observer.backbone.config.in_chans]) for name, observer in observers.items()}


def _stacked(waiting: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([crops[name] for crops in waiting]) for name in waiting[0]}
