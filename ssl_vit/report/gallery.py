"""What the network attends to in some pictures, and the masks that methods without labels make of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_vit.attention.maps import Sight
from ssl_vit.attention.masks import mass_mask
from ssl_vit.attention.metrics import centre_prior, count_truth, iou, outline
from ssl_vit.attention.pictures import make_example
from ssl_vit.attention.segmenters import METHODS, NEED_CLS, make_segmenters
from ssl_vit.attention.stream import Attended as Seen
from ssl_vit.attention.stream import attend
from ssl_vit.attention.truth import MaskFolder, NoMask
from ssl_vit.config_pictures import ReportConfig
from ssl_vit.data.pictures import evenly
from ssl_vit.errors import UserError
from ssl_vit.evaluation.tiles import as_image, fitted
from ssl_vit.report.content import Attended, Segmented
from ssl_vit.report.folder import RunFolder
from ssl_vit.report.sources import Shown, shown_pictures, skipped_list, skipped_text

SIDE = 360  # pixels of a picture's longer side


class Gallery(NamedTuple):
    """Some pictures with their maps, and with their masks where truth is known."""

    attended: list[Attended]  # empty without a class token
    segmented: list[Segmented]
    how: str
    how_masked: str
    unmasked: str  # why there is no segmented picture


def make_gallery(run: RunFolder, config: ReportConfig) -> Gallery:
    """Look at `config.limit` pictures, evenly spread over all that there are.

    Raises:
        UserError: There is no picture that could be used, or no network, or it has diverged.
    """
    network = run.network
    shown = shown_pictures(run, config)
    truths = None if shown.masks is None else MaskFolder(shown.masks)
    places = evenly(len(shown.pictures), config.limit).tolist()
    with skipped_list() as skipped:
        stream = attend(shown.pictures, places, networks=[network], max_side=config.max_side, skipped=skipped)
        seen = sorted(stream, key=lambda one: one.place)
        left_out = skipped_text(skipped)
    if not seen:
        raise UserError(f"No picture {shown.text} could be used.{left_out}")
    if not all(_is_finite(one.sights[0]) for one in seen):
        raise UserError(f"{network.source}: its attention or its tokens are not finite: training has diverged.")
    masked = [(one, _truth(truths, shown, one)) for one in seen]
    attended = [_attended(shown, one, truth, config.mass) for one, truth in masked] if network.backbone.has_cls else []
    segmented = _segmented(shown, masked, config.mass)
    reduced = "" if config.max_side is None else f", larger ones reduced to {config.max_side} pixels"
    how = (
        f"{len(seen)} pictures {shown.text}, evenly spread over {len(shown.pictures):,}; each side brought to the "
        f"nearest multiple of the patch{reduced}. A map is the [CLS] row of the last block's softmax over all tokens "
        "in float32, patches only, scaled to sum 1; a mask is the fewest patches that hold the chosen share of it; "
        f"IoU is counted in pixels of the picture at its own size.{left_out}"
    )
    return Gallery(attended, segmented, how, _how_masked(segmented, len(seen), config.mass), _unmasked(shown, masked))


def _is_finite(sight: Sight) -> bool:
    parts = (sight.patches, sight.keys, sight.patches if sight.cls is None else sight.cls)
    return all(bool(part.isfinite().all()) for part in parts)


def _truth(truths: MaskFolder | None, shown: Shown, seen: Seen) -> Tensor | None:
    """The picture's object mask (H, W) bool, where there is one that fits."""
    if truths is None:
        return None
    try:
        return truths.read(shown.pictures.name(seen.place), (seen.picture.shape[-2], seen.picture.shape[-1]))
    except NoMask:
        return None


def _attended(shown: Shown, seen: Seen, truth: Tensor | None, mass: float) -> Attended:
    maps = seen.sights[0].cls
    assert maps is not None  # the network has a class token
    example = make_example(seen.picture, maps, mass, truth)
    size = fitted(seen.picture, min(SIDE, max(seen.picture.shape[-2:])))
    return Attended(shown.pictures.name(seen.place), as_image(seen.picture, size), maps, truth, example.ious)


def _segmented(shown: Shown, masked: list[tuple[Seen, Tensor | None]], mass: float) -> list[Segmented]:
    """The pictures with a mask that they can be compared with."""
    sights = [seen.sights[0] for seen, _ in masked]
    names = [name for name in METHODS if sights[0].cls is not None or name not in NEED_CLS]
    segmenters = make_segmenters(names, sights)
    pictures = []
    for seen, truth in masked:
        if truth is None:
            continue
        sight = seen.sights[0]
        masks = {} if sight.cls is None else {"attention": mass_mask(sight.cls.mean(0), mass)}
        masks |= {name: segmenter(sight).mask for name, segmenter in segmenters.items()}
        counted = count_truth(truth, (sight.keys.shape[1], sight.keys.shape[2]))
        ious = dict(zip(masks, iou(torch.stack([*masks.values()]), counted).tolist(), strict=True))
        size = fitted(seen.picture, min(SIDE, max(seen.picture.shape[-2:])))
        image = as_image(seen.picture, size)
        pictures.append(Segmented(shown.pictures.name(seen.place), image, truth, masks, ious))
    return pictures


def _how_masked(segmented: list[Segmented], seen: int, mass: float) -> str:
    """Nothing where there is no such picture."""
    if not segmented:
        return ""
    count, names = len(segmented), segmented[0].ious
    means = [f"{name} {sum(one.ious[name] for one in segmented) / count:.2f}" for name in names]
    outlines = torch.stack([outline(one.truth) for one in segmented])  # (n, 64, 64)
    trivial = [f"the whole picture {float(outlines.double().mean()):.2f}"]
    if count > 1:
        trivial.append(f"the centre prior {float(centre_prior(outlines)[0].mean()):.2f}")
    return (
        f"`attention` is the mask of the heads' mean map with {100 * mass:g} % of the attention; `lost` and `tokencut` "
        "are made of the last block's keys, `found` of these and the attention, `pca` of the patch tokens, its "
        f"components those of the {seen} pictures shown. Mean IoU of {count} pictures: {', '.join(means)}; without a "
        f"network: {', '.join(trivial)}. So few pictures show, they do not measure: `ssl-vit attention` does."
    )


def _unmasked(shown: Shown, masked: list[tuple[Seen, Tensor | None]]) -> str:
    if any(truth is not None for _, truth in masked):
        return ""
    if shown.masks is None:
        return "There are no object masks to compare with. Name some: `images=FOLDER masks=FOLDER`."
    return f"None of the pictures shown has a usable mask in {shown.masks}."
