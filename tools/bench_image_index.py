"""Measure how long a folder of many files takes to find, and how much memory, with nothing and all remembered.

    python tools/bench_image_index.py FOLDER 1000000 1000

Makes that many empty files in that many class folders below FOLDER (which must not exist), finds them, and removes all
of it again. Each row is a process of its own; its seconds and its peak memory (MiB, /proc of Linux) count from behind
the imports. The files were just made, so the operating system knows their names: no disk is waited for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SETTLE = 2.5  # seconds after which an index of the folder is remembered

CHILD = """
import json, sys, time
from pathlib import Path

import ssl_vit.data.sources.image_index
from ssl_vit.data.dataset_factory import build_dataset

ssl_vit.data.sources.image_index._MIN_SECONDS = 0.0  # remembered, however quick it was


def memory(kind):
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before, start = memory("VmRSS"), time.perf_counter()
images = build_dataset(sys.argv[1], Path(sys.argv[2]))
seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
names = images.names
print(json.dumps({
    "seconds": seconds, "peak": peak, "kept": memory("VmRSS") - before, "images": len(images),
    "length": len(names.text) / len(names), "packed": (names.text.nbytes + names.ends.nbytes) / len(names),
}))
"""


def main(folder: Path, files: int, folders: int) -> None:
    """Make, measure, remove."""
    root, listing = folder / "images", folder / "list.txt"
    root.mkdir(parents=True)
    try:
        make(root, listing, files, folders)
        time.sleep(SETTLE)
        rows = {
            "folder, nothing remembered": measure("folder", root, folder),
            "folder, remembered": measure("folder", root, folder),
            "list file": measure("list", listing, folder),
        }
    finally:
        shutil.rmtree(folder)
    first = rows["folder, remembered"]
    print(f"{files:,} files in {folders:,} folders, paths of {first['length']:.0f} bytes, packed {first['packed']:.0f}")
    print(f"{'':<28}{'seconds':>9}{'peak MiB':>10}{'kept MiB':>10}")
    for name, row in rows.items():
        assert row["images"] == files, row
        print(f"{name:<28}{row['seconds']:>9.2f}{row['peak']:>10.0f}{row['kept']:>10.0f}")


def make(root: Path, listing: Path, files: int, folders: int) -> None:
    """Empty files, evenly spread, and a list of their paths."""
    with listing.open("w", encoding="utf-8") as lines:
        for number in range(folders):
            folder = root / f"class_{number:06d}"
            folder.mkdir()
            for i in range(number, files, folders):
                path = f"{folder}/image_{i:08d}.jpg"
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
                lines.write(path + "\n")


def measure(source: str, root: Path, folder: Path) -> dict[str, float]:
    """Return what a fresh process prints."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.absolute() / "cache")}
    command = [sys.executable, "-c", CHILD, source, str(root)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
