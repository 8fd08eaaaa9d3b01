"""Which pictures a report shows, and their features: stored by an evaluation, or described now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pydantic import ValidationError

from ssl_vit.config_evaluation import EvalDataConfig
from ssl_vit.config_pictures import ReportConfig
from ssl_vit.data.files import pictures_at
from ssl_vit.data.find import LabelledSplit, find_described
from ssl_vit.data.pictures import Pictures, SkippedPictures, Subset, evenly
from ssl_vit.errors import UserError
from ssl_vit.evaluation.export import Part
from ssl_vit.evaluation.features import NetworkTokens, check_health, check_size, extract
from ssl_vit.evaluation.store import Store, features_folder, stores_of
from ssl_vit.evaluation.study import BLOCKS
from ssl_vit.records.naming import data_name
from ssl_vit.report.folder import RunFolder
from ssl_vit.transforms.evaluation import EvalTransform

NO_PICTURES = "Name pictures: images=FOLDER, or labelled ones: data.root=FOLDER."


class Shown(NamedTuple):
    """Pictures of the attention gallery, and the folder of their masks if there is one."""

    pictures: Pictures
    masks: Path | None
    text: str  # which they are


class Known(NamedTuple):
    """Pictures with their features."""

    bank: Part  # to search in
    asked: Part | None  # to search for; None: the bank itself
    text: str  # which they are, and where their features are from


def shown_pictures(run: RunFolder, config: ReportConfig) -> Shown:
    """The named ones; else those of the run's attention record; else the run's own; else the labelled ones.

    Raises:
        UserError: There are none any more.
    """
    if config.images is not None:
        return Shown(pictures_at(config.images), config.masks, f"of {config.images}")
    for record in run.records:
        given = record.data.model_extra or {}
        if record.task == "attention" and Path(str(given.get("images"))).exists():
            masks = given.get("masks")
            pictures = pictures_at(Path(str(given["images"])))
            return Shown(pictures, None if masks is None else Path(str(masks)), f"of {record.data.name}")
    try:
        return Shown(find_described(_own(run, config)).train, None, "that the run has learned from")
    except UserError as error:
        if not config.data.named:
            raise UserError(f"The run's own pictures are not there: {error}. {NO_PICTURES}") from None
    return Shown(find_described(config.data).train, None, "of the labelled set")


def known_pictures(run: RunFolder, config: ReportConfig) -> Known:
    """The named ones with labels; else those of the run's newest evaluation; else the run's own.

    Features that an evaluation has stored are taken. Otherwise `config.points` pictures, evenly spread, are described.

    Raises:
        UserError: There are none any more, or the network or its features are of no use.
    """
    run.network.backbone.need_cls()
    if config.data.named:
        return _known(run, config, config.data)
    for record in sorted(run.records, key=lambda record: record.created, reverse=True):
        try:
            data = EvalDataConfig.model_validate(record.config["data"])
            return _known(run, config, data)
        except (LookupError, ValidationError, UserError):  # an older record, or pictures that are gone since
            continue
    try:
        return _known(run, config, _own(run, config))
    except UserError as error:
        raise UserError(f"{error}. {NO_PICTURES}") from None


@contextmanager
def skipped_list() -> Iterator[SkippedPictures]:
    """A list of pictures that cannot be read, for as long as the block lasts."""
    with TemporaryDirectory() as folder:
        yield SkippedPictures(Path(folder) / "skipped.txt")


def skipped_text(skipped: SkippedPictures) -> str:
    """How many, and the first of them; nothing where there is none."""
    if not (count := skipped.count()):
        return ""
    name, _, reason = skipped.path.read_text(encoding="utf-8").splitlines()[0].partition("\t")
    return f" {count:,} could not be used, the first is {name}: {reason}."


def _own(run: RunFolder, config: ReportConfig) -> EvalDataConfig:
    """The pictures that the run has learned from.

    Raises:
        UserError: config.yaml does not say which.
    """
    own = {name: run.value(f"data.{name}") for name in ("source", "root", "train")}
    try:
        return EvalDataConfig.model_validate({**config.data.model_dump(), **own, "test": None})
    except ValidationError:
        raise UserError("config.yaml does not say which pictures the run has learned from") from None


def _known(run: RunFolder, config: ReportConfig, data: EvalDataConfig) -> Known:
    loaded = run.network
    size = data.image_size or loaded.backbone.config.img_size
    check_size(size, loaded.backbone.patch_size)
    transform = EvalTransform(size, data.crop_ratio, loaded.mean, loaded.std)
    split = find_described(data)
    describe = NetworkTokens(loaded, transform, blocks=min(BLOCKS, len(loaded.backbone.vit.blocks)))
    stores = _stored(describe, split, features_folder(config.features, run.path), data_name(data))
    if stores is None:
        return _described_now(run, config, split.train, transform)
    names = ("train", "test")
    parts = [Part(name, store.pictures, store.features(blocks=1)) for name, store in zip(names, stores, strict=False)]
    for part in parts:
        check_health(part.features, loaded.source)
    text = f"stored features of {' and '.join(part.pictures.describe() for part in parts)}."
    return Known(parts[0], parts[1] if len(parts) > 1 else None, text)


def _stored(describe: NetworkTokens, split: LabelledSplit, folder: Path, name: str) -> list[Store] | None:
    """The complete stores of all parts; None where one is missing."""
    if not folder.is_dir():
        return None
    found = []
    for part, pictures in zip(LabelledSplit._fields, split, strict=True):
        if pictures is None:
            continue
        candidates = stores_of(describe, pictures, folder=folder, name=f"{name}-{part}")
        whole = next((store for store in candidates if store.complete() and not store.problem()), None)
        if whole is None:
            return None
        found.append(whole)
    return found


def _described_now(run: RunFolder, config: ReportConfig, pictures: Pictures, transform: EvalTransform) -> Known:
    """The features of evenly spread pictures, each searched for among the others."""
    places = evenly(len(pictures), config.points)
    some = pictures if len(places) == len(pictures) else Subset(pictures, places)
    with skipped_list() as skipped:
        features = extract(
            run.network,
            some,
            transform,
            blocks=1,
            batch_size=config.data.batch_size,
            workers=config.data.workers,
            skipped=skipped,
        )
        left_out = skipped_text(skipped)
    check_health(features, run.network.source)
    return Known(
        Part("train", some, features), None, f"features, described for this page, of {some.describe()}.{left_out}"
    )
