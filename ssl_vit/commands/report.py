"""`ssl-vit report`: a run as one page that opens anywhere, and the same as JSON.

ssl-vit report run=runs/photos
ssl-vit report run=runs/photos data.root=labeled images=ecssd/images masks=ecssd/masks
ssl-vit report run=runs/photos projection=tsne out=photos.html
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import NamedTuple

from ssl_vit.commands.inspect import inspect
from ssl_vit.commands.load_config import compose_config, load_config
from ssl_vit.config.visualize import InspectConfig, ReportConfig
from ssl_vit.data.dataset import escape_path
from ssl_vit.runtime.atomic_io import atomic_write, write_json
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs
from ssl_vit.visualization.analysis.analysis_result import INSPECT_JSON
from ssl_vit.visualization.report.build import collect_report
from ssl_vit.visualization.report.html import render
from ssl_vit.visualization.report.report_data import ReportData, downscale_images, to_json
from ssl_vit.visualization.report.run_reader import check_run

MAX_BYTES = 10_000_000  # of a page


class ReportFile(NamedTuple):
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
        f"{escape_path(written.path)}: {written.size / 1e6:.1f} MB, in {written.seconds:.0f} s; "
        f"{written.path.with_suffix('.json').name} beside it"
    )


def write(config: ReportConfig) -> ReportFile:
    """Write the page and its JSON export.

    Raises:
        UserError: The folder holds no run, or the page cannot be written where it should be.
    """
    began = time.perf_counter()
    check_run(config.run)
    out = config.out or config.run / "report.html"
    export = out.with_suffix(".json")
    _check_place(config, out, export)
    print(f"Gathering {escape_path(config.run)}: results, curves, attention, neighbors, feature map", flush=True)
    if config.inspect and not (config.run / "inspect" / INSPECT_JSON).exists():
        _inspect(config)
    report = collect_report(config, _command(config))
    page = _render_page(report)
    record_outputs([out, export], "report")
    with atomic_write(out) as file:
        file.write(page)
    write_json(export, to_json(report))
    return ReportFile(out, len(page), report.missing, time.perf_counter() - began)


def _check_place(config: ReportConfig, out: Path, export: Path) -> None:
    """Check, before minutes of work, that the page can be written and that it replaces nothing else."""
    try:
        check_outputs([out, export], "report", inputs={"images": config.images}, is_own=config.out is None)
    except UserError as error:
        raise UserError(str(error).replace("out=", "out=FILE.html")) from None


def _inspect(config: ReportConfig) -> None:
    """Draw the figures of `ssl-vit inspect`; a report does without them where that is not possible."""
    words = [f"checkpoint={config.run}", f"weights={config.weights}", f"out={config.run / 'inspect'}"]
    words += [] if config.images is None else [f"images={config.images}"]
    try:
        inspect(load_config("inspect", words, InspectConfig))
    except (UserError, OSError) as error:  # the model cannot be loaded, say, or the folder is one to read only
        print(f"No drawings of what is inside the model: {error}")


def _render_page(report: ReportData) -> bytes:
    """Render the page; its images are halved, three times at most, until it fits."""
    page = render(report).encode()
    for _ in range(3):
        if len(page) <= MAX_BYTES:
            break
        print(f"The page would have {len(page) / 1e6:.1f} MB: its images are halved", flush=True)
        report = downscale_images(report)
        page = render(report).encode()
    return page


def _command(config: ReportConfig) -> str:
    """Return the command that makes this report again: the values that differ from the defaults."""
    default, given = _flat(compose_config("report", [], ReportConfig)), _flat(config.model_dump(mode="json"))
    words = [f"{key}={value}" for key, value in given.items() if value != default[key]]
    return shlex.join(["ssl-vit", "report", *map(escape_path, words)])


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
