"""Drawings of a run from its folder: the views that it saw first, and what it restores. For `inspect` and `report`."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from ssl_vit.attention.summary import NETWORK
from ssl_vit.data.files import FilePictures
from ssl_vit.data.find import find_pictures
from ssl_vit.data.names import Names
from ssl_vit.data.pictures import BrokenPicture, Pictures, SkippedPictures, evenly
from ssl_vit.errors import UserError
from ssl_vit.inspection.panel import Panel
from ssl_vit.inspection.reconstruction_sheet import reconstruction_sheet
from ssl_vit.inspection.reconstructions import means, reconstruct
from ssl_vit.inspection.settings import RunSettings, run_settings
from ssl_vit.inspection.views import first_seen
from ssl_vit.inspection.views_sheet import views_sheet
from ssl_vit.methods.restoring import load_restorer, restored
from ssl_vit.training.runs import DATA, PICTURES
from ssl_vit.transforms.evaluation import EvalTransform


def views_panel(run: Path, *, count: int = 4) -> Panel:
    """The pictures that the run in a folder saw first, with their views.

    Raises:
        UserError: The folder holds no pretraining run, or its pictures are not where they were or have changed.
    """
    settings = run_settings(run)
    pictures = _learned_from(run, settings)
    with tempfile.TemporaryDirectory() as folder:
        skipped = SkippedPictures(Path(folder) / "skipped.txt")
        seen = first_seen(settings, pictures, count=count, skipped=skipped)
    kinds = settings.method.views
    views = f"{kinds.global_crops.count} global views of {kinds.global_crops.size} px"
    if kinds.local_crops.count:
        views += f" and {kinds.local_crops.count} local views of {kinds.local_crops.size} px"
    text = (
        f"The first {len(seen)} pictures of the run's first step with their {views}, as the network was given them. "
        "The frame with a view's number and colour is where it was cut out."
    )
    if seen[0].puzzles:
        text += " SiT turns each view, hides parts of it with noise and other pictures, and has to restore it."
    if not (run / DATA).is_file():
        text += " The run did not write down its pictures: these are made of those there are now."
    return Panel("Views that the run trained on", views_sheet(seen), text)


def reconstruction_panel(run: Path, checkpoint: Path | None = None, *, count: int = 8) -> Panel | None:
    """What a SiT run restores of some of its pictures; they are the same ones, corrupted in the same way, at any time.

    Args:
        run: Its folder.
        checkpoint: One of its `.ckpt` files; None: the last one.
        count: Pictures, evenly spread over the run's own.

    Returns:
        None where there is nothing to draw: no SiT run, reconstruction turned off, or no checkpoint with the heads.

    Raises:
        UserError: The folder holds no pretraining run, its pictures are not where they were, or the checkpoint does
            not fit exactly.
    """
    settings = run_settings(run)
    method = settings.method
    network = load_restorer(checkpoint or run, method, settings.backbone)
    if network is None or method.name != "sit":
        return None
    pictures = _pictures(settings)
    transform = EvalTransform(method.views.global_crops.size, 0.875, method.views.mean, method.views.std)
    crops = []
    for place in evenly(len(pictures), count).tolist():
        try:
            crops.append(transform(pictures.read(place, settings.backbone.in_chans)))
        except BrokenPicture:
            continue
    if not crops:
        raise UserError(f"{settings.data.root}: none of the pictures that would be restored can be read")
    found = reconstruct(torch.stack(crops), partial(restored, network), method, seed=settings.seed)
    text = f"{len(found)} pictures, corrupted as in training, and what the network restores."
    if over := means([one.on_hidden for one in found]):
        text += " On the hidden pixels " + ", ".join(
            f"{'the network' if name == NETWORK else name} has L1 {far.l1:.3f} and PSNR {far.psnr:.1f} dB"
            for name, far in over.items()
        )
    return Panel("Reconstructions", reconstruction_sheet(found), f"{text}. L1 and PSNR are of values from 0 to 1.")


def _learned_from(run: Path, settings: RunSettings) -> Pictures:
    """The run's pictures as it had them, without what has been added to them since.

    Raises:
        UserError: They are not where they were, or have changed.
    """
    pictures = _pictures(settings)
    try:
        fingerprint = json.loads((run / DATA).read_text(encoding="utf-8"))["fingerprint"]
        if pictures.fingerprint(sizes=False) == fingerprint:
            return pictures
        before = Names.load(run / PICTURES) if isinstance(pictures, FilePictures) else None
    except FileNotFoundError:  # an earlier version wrote no fingerprint
        return pictures
    except (OSError, ValueError, LookupError, TypeError):
        before = None
    if before is None or not isinstance(pictures, FilePictures) or not set(before) <= set(pictures.names):
        raise UserError(f"{settings.data.root}: the pictures have changed since: which it saw first cannot be said")
    return pictures.with_names(before)


def _pictures(settings: RunSettings) -> Pictures:
    return find_pictures(settings.data.source, settings.data.root)
