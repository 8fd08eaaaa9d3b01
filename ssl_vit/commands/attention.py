"""`ssl-vit attention`: what the [CLS] token looks at in pictures of any size; with masks, how well it finds objects.

ssl-vit attention checkpoint=runs/photos images=photos out=maps
ssl-vit attention checkpoint=timm:vit_small_patch16_224.dino images=photo.jpg
ssl-vit attention checkpoint=runs/photos images=ecssd/images masks=ecssd/masks out=maps
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.attention.gallery import Gallery
from ssl_vit.attention.pictures import contact_sheet, make_example
from ssl_vit.attention.record import write_ious, write_record
from ssl_vit.attention.stream import attend
from ssl_vit.attention.summary import Result, Summary, iou_table
from ssl_vit.attention.truth import MaskFolder, NoMask
from ssl_vit.config_evaluation import AttentionConfig
from ssl_vit.data.files import FilePictures, pictures_at
from ssl_vit.data.pictures import BrokenPicture, SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.models.weights import LoadedBackbone, load_backbone, random_twin
from ssl_vit.training.hardware import best_device

SHEET_ROWS = 3  # of the best, the middle and the worst pictures each


class Outcome(NamedTuple):
    """What one run of the command did; its files lie in `config.out`."""

    written: int  # pictures
    skipped: int  # pictures that could not be used
    unscored: int  # pictures without a mask that they could be scored by
    results: list[Result]  # of the scored pictures; empty without masks
    sheet: Path
    seconds: float


def main(config: AttentionConfig) -> None:
    """Run the command."""
    outcome = segment(config)
    if outcome.results:
        print(iou_table(outcome.results, mass=config.mass))
    print(_report(config, outcome))


def segment(config: AttentionConfig) -> Outcome:
    """Write maps, masks and drawings of all pictures into `config.out`, and score them where masks are given.

    Raises:
        UserError: There is no picture, or none that could be used or, with masks, scored.
    """
    pictures = _pictures(config)
    truths = MaskFolder(config.masks) if config.masks else None
    networks = _networks(config)
    places = range(len(pictures))[: config.limit]
    gallery = Gallery(config.out, [pictures.name(place) for place in places])
    skipped, unscored = (_fresh_list(config.out / f"{name}.txt") for name in ("skipped", "unscored"))
    summary = Summary(mass=config.mass, seed=config.seed)
    written = []
    start = time.perf_counter()
    stream = attend(pictures, places, networks=networks, max_side=config.max_side, skipped=skipped)
    for seen in tqdm(stream, total=len(places), unit=" pictures", desc="attention"):
        truth = _truth(truths, pictures.name(seen.place), seen.picture, unscored)
        maps = [sight.cls for sight in seen.sights]
        gallery.write(seen.place, make_example(seen.picture, maps[0], config.mass, truth))
        written.append(seen.place)
        if truth is not None:
            summary.add(seen.place, maps, truth)
    seconds = time.perf_counter() - start
    if not written:
        raise UserError(f"images={config.images}: no picture could be used; {skipped.path} says why")
    if truths and not summary.places:
        raise UserError(f"masks={config.masks}: no picture has a usable mask; {unscored.path} says why")
    results = summary.results() if truths else []
    sheet = _write_sheet(config, pictures, gallery, truths, _choose(written, summary, results))
    outcome = Outcome(len(written), skipped.count(), unscored.count(), results, sheet, seconds)
    counts = {"pictures": outcome.written, "skipped": outcome.skipped, "unscored": outcome.unscored}
    write_record(
        config, networks[0], results, data={"fingerprint": pictures.fingerprint(sizes=True), **counts}, started=start
    )
    write_ious(config.out / "ious.npz", results, [pictures.name(place) for place in summary.places])
    return outcome


def _pictures(config: AttentionConfig) -> FilePictures:
    """All pictures of the folder, or the one picture that was named."""
    if config.out.absolute().is_relative_to(config.images.absolute()):
        raise UserError(f"out={config.out} lies inside images={config.images}: choose a folder outside of it")
    return pictures_at(config.images)


def _networks(config: AttentionConfig) -> list[LoadedBackbone]:
    """The network, and beside it the same with random weights where there are scores to compare."""
    networks = [load_backbone(config.checkpoint, config.weights)]
    if config.masks and config.baselines:
        networks.append(random_twin(networks[0], config.seed))
    for network in networks:
        network.backbone.to(best_device())
    return networks


def _fresh_list(path: Path) -> SkippedPictures:
    path.unlink(missing_ok=True)
    return SkippedPictures(path)


def _truth(truths: MaskFolder | None, name: str, picture: Tensor, unscored: SkippedPictures) -> Tensor | None:
    """The picture's object mask (H, W) bool, if there is one that fits."""
    if truths is None:
        return None
    try:
        return truths.read(name, (picture.shape[-2], picture.shape[-1]))
    except NoMask as reason:
        unscored.record(BrokenPicture(name, str(reason)))
        return None


class _Chosen(NamedTuple):
    place: int  # among the pictures
    caption: str


def _choose(written: list[int], summary: Summary, results: list[Result]) -> list[_Chosen]:
    """Pictures for the sheet: the best, the middle and the worst by the heads' mean; unscored ones evenly spread."""
    rows = 3 * SHEET_ROWS
    if not results:
        spread = torch.linspace(0, len(written) - 1, min(len(written), rows)).long().tolist()
        return [_Chosen(sorted(written)[place], "") for place in spread]
    scores = results[0].ious["mass/mean"]
    order = scores.argsort(descending=True).tolist()
    named = [("", place) for place in order]
    if len(order) > rows:
        starts = {"best": 0, "median": (len(order) - SHEET_ROWS) // 2, "worst": len(order) - SHEET_ROWS}
        named = [(f"{name}\n", place) for name, start in starts.items() for place in order[start : start + SHEET_ROWS]]
    return [_Chosen(summary.places[place], f"{name}IoU {scores[place]:.2f}") for name, place in named]


def _write_sheet(
    config: AttentionConfig, pictures: FilePictures, gallery: Gallery, truths: MaskFolder | None, chosen: list[_Chosen]
) -> Path:
    """`sheet.jpg`: a row of tiles for each chosen picture, read again from disk."""
    rows = []
    for place, caption in chosen:
        maps = gallery.maps(place)
        picture = pictures.read(place, 3)
        truth = truths.read(pictures.name(place), (picture.shape[-2], picture.shape[-1])) if truths else None
        rows.append((f"{caption}\n{pictures.name(place)}".strip(), make_example(picture, maps, config.mass, truth)))
    path = config.out / "sheet.jpg"
    contact_sheet(rows).save(path, quality=90, subsampling=0)
    return path


def _report(config: AttentionConfig, outcome: Outcome) -> str:
    """What was done and where it lies, in a few lines."""
    rate = outcome.written / outcome.seconds
    lines = [f"{outcome.written} pictures in {outcome.seconds:.0f} s ({rate:.1f} a second); see {outcome.sheet}"]
    if outcome.skipped:
        lines.append(f"{outcome.skipped} pictures could not be used: {config.out / 'skipped.txt'} says why")
    if outcome.unscored:
        lines.append(f"{outcome.unscored} pictures have no usable mask: {config.out / 'unscored.txt'} says why")
    lines.append(f"{config.out} holds overlays/, heads/, masks/ and maps/ under the pictures' names")
    return "\n".join(lines)
