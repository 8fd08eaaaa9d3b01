"""`ssl-vit scan`: summarize an image folder, unreadable files included."""

from __future__ import annotations

from ssl_vit.config.pretrain import ScanConfig
from ssl_vit.data.dataset_summary import summarize_dataset
from ssl_vit.data.sources.image_folder import read_image_list, scan_image_folder
from ssl_vit.runtime.atomic_io import write_json
from ssl_vit.runtime.outputs import check_outputs, record_outputs


def main(config: ScanConfig) -> None:
    """Run the command."""
    if config.out:
        check_outputs([config.out / "scan.json"], "scan", inputs={})
    load = {"folder": scan_image_folder, "list": read_image_list}[config.data.source]
    summary = summarize_dataset(load(config.data.root).with_range(config.data.range))
    print(summary.as_text())
    if config.out:
        file = config.out / "scan.json"
        record_outputs([file], "scan")
        write_json(file, summary._asdict())
        print(f"\nAll file names: {file}")
