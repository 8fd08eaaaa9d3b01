"""`ssl-vit report`: a run as one page that opens anywhere, and the same as JSON.

ssl-vit report run=runs/photos
ssl-vit report run=runs/photos data.root=labelled images=ecssd/images masks=ecssd/masks
ssl-vit report run=runs/photos projection=tsne out=photos.html
"""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import NamedTuple

from ssl_vit.commands.compose import compose_values, load_config
from ssl_vit.commands.inspect import inspect
from ssl_vit.config_pictures import InspectConfig, ReportConfig
from ssl_vit.data.pictures import printable
from ssl_vit.durable import durable, write_json
from ssl_vit.errors import UserError
from ssl_vit.inspection.files import INDEX
from ssl_vit.report.content import Content
from ssl_vit.report.gather import gather
from ssl_vit.report.page import render
from ssl_vit.report.smaller import MOST_BYTES, halved
from ssl_vit.report.twin import as_plain


class Written(NamedTuple):
    """A report that was written."""

    path: Path  # of the page
    size: int  # bytes
    missing: dict[str, str]  # by section: why it is not there, and the command that makes it
    seconds: float


def main(config: ReportConfig) -> None:
    """Run the command."""
    written = write(config)
    for section, text in written.missing.items():
        print(f"{section}: {text.replace('`', '')}")
    print(
        f"{printable(written.path)}: {written.size / 1e6:.1f} MB, in {written.seconds:.0f} s; "
        f"{written.path.with_suffix('.json').name} beside it"
    )


def write(config: ReportConfig) -> Written:
    """Write the page and its JSON twin.

    Raises:
        UserError: The folder holds no run, or the page cannot be written where it should be.
    """
    began = time.perf_counter()
    out = config.out or config.run / "report.html"
    twin = out.with_suffix(".json")
    _check_place(config, out, twin)
    print(
        f"Gathering {printable(config.run)}: records, curves, attention, neighbours, a map of the features", flush=True
    )
    if config.inspect and config.run.is_dir() and not (config.run / "inspect" / INDEX).exists():
        _inspect(config)
    content = gather(config, _command(config))
    page = _page(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    with durable(out) as file:
        file.write(page)
    write_json(twin, as_plain(content))
    return Written(out, len(page), content.missing, time.perf_counter() - began)


def _check_place(config: ReportConfig, out: Path, twin: Path) -> None:
    """Before minutes of work: there is a run, the page can be written, and its twin replaces nothing else."""
    if config.out is None and not config.run.is_dir():
        return  # gathering says what is wrong with it
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK):
        raise UserError(f"{printable(folder)} cannot be written to: name another place with out=FILE.html")
    if config.out is not None and twin.exists() and not out.exists():
        raise UserError(f"{printable(twin)} is there and may be of something else: name another page with out=")


def _inspect(config: ReportConfig) -> None:
    """Make the drawings of what is inside the network; a report does without them where that cannot be done."""
    words = [f"checkpoint={config.run}", f"weights={config.weights}", f"out={config.run / 'inspect'}"]
    words += [] if config.images is None else [f"images={config.images}"]
    try:
        inspect(load_config("inspect", words, InspectConfig))
    except (UserError, OSError) as error:  # the network cannot be loaded, say, or the folder is one to read only
        print(f"No drawings of what is inside the network: {error}")


def _page(content: Content) -> bytes:
    """The page; its pictures are halved, thrice at most, until it fits."""
    page = render(content).encode("utf-8", "backslashreplace")
    for _ in range(3):
        if len(page) <= MOST_BYTES:
            break
        print(f"The page would have {len(page) / 1e6:.1f} MB: its pictures are halved", flush=True)
        content = halved(content)
        page = render(content).encode("utf-8", "backslashreplace")
    return page


def _command(config: ReportConfig) -> str:
    """The words that make this report again: those that differ from the defaults."""
    default, given = _flat(compose_values("report", [])), _flat(config.model_dump(mode="json"))
    words = [f"{key}={value}" for key, value in given.items() if value != default[key]]
    return shlex.join(["ssl-vit", "report", *map(printable, words)])


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
