"""`ssl-vit scan`: what is in a picture folder, broken files included."""

from __future__ import annotations

from ssl_vit.config import ScanConfig
from ssl_vit.data.files import folder_pictures, listed_pictures
from ssl_vit.data.scan import scan_files
from ssl_vit.durable import write_json


def main(config: ScanConfig) -> None:
    """Run the command."""
    find = {"folder": folder_pictures, "list": listed_pictures}[config.data.source]
    report = scan_files(find(config.data.root))
    print(report.as_text())
    if config.out:
        config.out.mkdir(parents=True, exist_ok=True)
        file = config.out / "scan.json"
        write_json(file, report.as_json())
        print(f"\nAll names: {file}")
