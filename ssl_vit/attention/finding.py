"""What a network finds in pictures by several methods: attention, and those that need no threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ssl_vit.attention.maps import Sight
from ssl_vit.attention.masks import mass_mask
from ssl_vit.attention.refine import check_opencv, refine
from ssl_vit.attention.scoring import Objects
from ssl_vit.attention.segmenters import METHODS, NEED_CLS, Segmentation, make_segmenters
from ssl_vit.attention.stream import attend
from ssl_vit.data.pictures import Pictures, SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.models.weights import LoadedBackbone

ATTENTION = "attention"
MEAN, REFINED = "mean", "+guided"  # the heads' mean, and what the names of refined masks end in
SAMPLE = 50  # pictures from which components common to all are found


def check_methods(network: LoadedBackbone, names: Sequence[str]) -> None:
    """Compare what the methods need with what the network has.

    Raises:
        UserError: A method needs the class token, and there is none.
    """
    needing = [name for name in names if name == ATTENTION or name in NEED_CLS]
    if needing and not network.backbone.has_cls:
        others = ",".join(name for name in METHODS if name not in NEED_CLS)
        raise UserError(
            f"methods=[{','.join(names)}]: {network.backbone.config.name} has no class token, which "
            f"{' and '.join(needing)} cannot do without; methods=[{others}] need none"
        )


class Finder:
    """The methods, ready for one network.

    Args:
        names: Of the methods; `attention` is that of the [CLS] token.
        sample: What the network sees in a sample of the pictures; read only where a method needs it.
        mass: Share of the attention that a mask holds.
        refine: Whether masks are also drawn along the pictures' edges: that of the heads' mean, and of each method.

    Raises:
        UserError: Masks are to be refined, and what that needs is not installed.
    """

    def __init__(self, names: Sequence[str], sample: Iterable[Sight], *, mass: float, refine: bool) -> None:
        if refine:
            check_opencv()
        self.with_attention = ATTENTION in names
        self.segmenters = make_segmenters([name for name in names if name != ATTENTION], sample)
        self.mass = mass
        self.refine = refine

    def __call__(self, sight: Sight, picture: Tensor) -> Objects:
        """What is found in a picture (C, H, W) uint8 that the network sees so."""
        maps = sight.cls if self.with_attention else None
        methods = {name: segmenter(sight) for name, segmenter in self.segmenters.items()}
        if self.refine:
            masks = {name: found.mask for name, found in methods.items()}
            if maps is not None:
                masks = {MEAN: mass_mask(maps.mean(0), self.mass), **masks}
            for name, mask in masks.items():
                methods[name + REFINED] = from_mask(refine(mask, picture))
        return Objects(maps, methods)


def from_mask(mask: Tensor) -> Segmentation:
    """A mask whose soft map says no more than itself."""
    return Segmentation(mask.float(), mask)


def make_finders(
    networks: list[LoadedBackbone],
    pictures: Pictures,
    *,
    count: int,
    names: Sequence[str],
    mass: float,
    refine: bool,
    max_side: int | None,
    skipped: SkippedPictures,
) -> list[Finder]:
    """The methods for each network; what they need to know of all pictures is found from 50 that are spread evenly.

    Args:
        networks: Of one architecture.
        pictures: Of any size.
        count: The first so many of them are used.
        names: Of the methods.
        mass: Share of the attention that a mask holds.
        refine: Whether the masks are also drawn along the pictures' edges.
        max_side: As for `attend`.
        skipped: As for `attend`.
    """
    places = torch.linspace(0, count - 1, min(count, SAMPLE)).long().tolist()
    finders = []
    for network in networks:
        seen = attend(pictures, places, networks=[network], max_side=max_side, skipped=skipped)
        finders.append(Finder(names, (one.sights[0] for one in seen), mass=mass, refine=refine))
    return finders
