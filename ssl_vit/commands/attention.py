"""`ssl-vit attention`: what the [CLS] token looks at in pictures of any size; with masks, how well it finds objects.

ssl-vit attention checkpoint=runs/photos images=photos out=maps
ssl-vit attention checkpoint=timm:vit_small_patch16_224.dino images=photo.jpg
ssl-vit attention checkpoint=runs/photos images=ecssd/images masks=ecssd/masks out=maps
ssl-vit attention checkpoint=runs/photos images=photos out=maps 'methods=[attention,lost,tokencut,pca,found]'
ssl-vit attention checkpoint=runs/photos voc=VOCdevkit/VOC2012 split=val out=voc
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.attention.chart import write_curves
from ssl_vit.attention.finding import check_methods, make_finders
from ssl_vit.attention.gallery import Gallery
from ssl_vit.attention.pictures import Example, contact_sheet, make_example
from ssl_vit.attention.record import write_ious, write_record
from ssl_vit.attention.scoring import Objects
from ssl_vit.attention.stream import attend
from ssl_vit.attention.summary import Result, Summary
from ssl_vit.attention.table import score_table
from ssl_vit.attention.truth import Annotation, MaskFolder, NoMask, Truths
from ssl_vit.attention.voc import VOC
from ssl_vit.config_pictures import AttentionConfig
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
    remarks: list[str]  # on how the masks were read
    sheet: Path
    seconds: float


def main(config: AttentionConfig) -> None:
    """Run the command."""
    if (config.out / "summary.json").exists():
        print(f"{config.out} holds an earlier result: what it has of other pictures and methods stays", flush=True)
    outcome = segment(config)
    if outcome.results:
        print(score_table(outcome.results, mass=config.mass))
    print(_report(config, outcome))


def segment(config: AttentionConfig) -> Outcome:
    """Write maps, masks and drawings of all pictures into `config.out`, and score them where masks are given.

    Raises:
        UserError: There is no picture, or none that could be used or, with masks, scored.
    """
    with TemporaryDirectory() as scores:
        return _segment(config, Summary(Path(scores), mass=config.mass, seed=config.seed))


def _segment(config: AttentionConfig, summary: Summary) -> Outcome:
    pictures, truths = _pictures(config)
    networks = _networks(config, scored=truths is not None)
    places = range(len(pictures))[: config.limit]
    gallery = Gallery(config.out, [pictures.name(place) for place in places])
    skipped, unscored = (_fresh_list(config.out / f"{name}.txt") for name in ("skipped", "unscored"))
    written = []
    start = time.perf_counter()
    finders = make_finders(
        networks, pictures, count=len(places), names=config.methods, mass=config.mass, refine=config.refine is not None,
        max_side=config.max_side, skipped=skipped,
    )  # fmt: skip
    stream = attend(pictures, places, networks=networks, max_side=config.max_side, skipped=skipped)
    for seen in tqdm(stream, total=len(places), unit=" pictures", desc="attention"):
        given = _given(truths, pictures.name(seen.place), seen.picture, unscored)
        objects = [find(sight, seen.picture) for find, sight in zip(finders, seen.sights, strict=True)]
        gallery.write(seen.place, _example(config, seen.picture, objects[0], given))
        written.append(seen.place)
        if given is not None:
            summary.add(seen.place, objects, given)
    seconds = time.perf_counter() - start
    if not written:
        source = f"images={config.images}" if config.images else f"voc={config.voc}"
        raise UserError(f"{source}: no picture could be used; {skipped.path} says why")
    if truths and not summary.places:
        source = f"masks={config.masks}" if config.masks else f"voc={config.voc}"
        raise UserError(f"{source}: no picture has a usable mask; {unscored.path} says why")
    results = summary.results() if truths else []
    sheet = _write_sheet(config, pictures, gallery, truths, _choose(written, summary, results))
    remarks = truths.remarks() if truths else []
    outcome = Outcome(len(written), skipped.count(), unscored.count(), results, remarks, sheet, seconds)
    _write_results(config, networks[0], outcome, pictures, [pictures.name(place) for place in summary.places], start)
    return outcome


def _write_results(
    config: AttentionConfig,
    network: LoadedBackbone,
    outcome: Outcome,
    pictures: FilePictures,
    scored: list[str],
    started: float,
) -> None:
    """The record, the scores of every picture by name, and the curve of the thresholds."""
    counts = {"pictures": outcome.written, "skipped": outcome.skipped, "unscored": outcome.unscored}
    data = {"fingerprint": pictures.fingerprint(sizes=True), **counts}
    write_record(config, network, outcome.results, data=data, remarks=outcome.remarks, started=started)
    write_ious(config.out / "ious.npz", outcome.results, scored)
    write_curves(config.out / "curve.png", outcome.results, config.mass)


def _pictures(config: AttentionConfig) -> tuple[FilePictures, Truths | None]:
    """All pictures of the folder or list, or the one picture that was named; and what is given of them."""
    if config.voc is not None:
        voc = VOC(config.voc, config.split)
        return voc.pictures, voc
    assert config.images is not None
    if config.out.absolute().is_relative_to(config.images.absolute()):
        raise UserError(f"out={config.out} lies inside images={config.images}: choose a folder outside of it")
    return pictures_at(config.images), MaskFolder(config.masks) if config.masks else None


def _networks(config: AttentionConfig, *, scored: bool) -> list[LoadedBackbone]:
    """The network, and beside it the same with random weights where there are scores to compare."""
    networks = [load_backbone(config.checkpoint, config.weights, cls_needed=False)]
    check_methods(networks[0], config.methods)
    if scored and config.baselines:
        networks.append(random_twin(networks[0], config.seed))
    for network in networks:
        network.backbone.to(best_device())
    return networks


def _fresh_list(path: Path) -> SkippedPictures:
    path.unlink(missing_ok=True)
    return SkippedPictures(path)


def _given(truths: Truths | None, name: str, picture: Tensor, unscored: SkippedPictures) -> Annotation | None:
    """What is given of the picture, if it is something that fits."""
    if truths is None:
        return None
    try:
        return truths.annotation(name, (picture.shape[-2], picture.shape[-1]))
    except NoMask as reason:
        unscored.record(BrokenPicture(name, str(reason)))
        return None


def _example(config: AttentionConfig, picture: Tensor, objects: Objects, given: Annotation | None) -> Example:
    truth, counted = (given.object, given.counted) if given is not None else (None, None)
    return make_example(picture, objects.maps, config.mass, truth, counted=counted, methods=objects.methods)


class _Chosen(NamedTuple):
    place: int  # among the pictures
    caption: str


def _choose(written: list[int], summary: Summary, results: list[Result]) -> list[_Chosen]:
    """Pictures for the sheet: the best, the middle and the worst by the heads' mean, or else the first method.

    Unscored ones, and those that have boxes alone, are evenly spread.
    """
    rows = 3 * SHEET_ROWS
    if not results or not results[0].ious:
        spread = torch.linspace(0, len(written) - 1, min(len(written), rows)).long().tolist()
        return [_Chosen(sorted(written)[place], "") for place in spread]
    ious = results[0].ious
    scores = ious["mass/mean"] if "mass/mean" in ious else next(iter(ious.values()))
    order = scores.argsort(descending=True).tolist()
    named = [("", place) for place in order]
    if len(order) > rows:
        starts = {"best": 0, "median": (len(order) - SHEET_ROWS) // 2, "worst": len(order) - SHEET_ROWS}
        named = [(f"{name}\n", place) for name, start in starts.items() for place in order[start : start + SHEET_ROWS]]
    return [_Chosen(summary.places[place], f"{name}IoU {scores[place]:.2f}") for name, place in named]


def _write_sheet(
    config: AttentionConfig, pictures: FilePictures, gallery: Gallery, truths: Truths | None, chosen: list[_Chosen]
) -> Path:
    """`sheet.jpg`: a row of tiles for each chosen picture, read again from disk."""
    rows = []
    for place, caption in chosen:
        picture = pictures.read(place, 3)
        given = (
            truths.annotation(pictures.name(place), (picture.shape[-2], picture.shape[-1]))
            if truths and caption
            else None
        )
        caption = f"{caption}\n{pictures.name(place)}".strip()
        rows.append((caption, _example(config, picture, gallery.objects(place), given)))
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
    lines += outcome.remarks
    lines.append(f"{config.out} holds overlays/, heads/, masks/ and maps/ under the pictures' names")
    return "\n".join(lines)
