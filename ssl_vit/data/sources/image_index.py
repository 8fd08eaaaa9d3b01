"""The images below a folder, remembered between runs where finding them takes long."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

from filelock import FileLock

from ssl_vit.data.sources.decode import EXTENSIONS
from ssl_vit.data.sources.directory_walk import WalkResult, directory_fingerprint, walk_images
from ssl_vit.data.sources.packed_paths import PackedPaths

_WORTH_S = 1.0  # what takes longer is remembered
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system: within one tick, two changes look like one
_KIND = f"ssl-vit index 1 {' '.join(sorted(EXTENSIONS))}"  # another version may look for other images


def cached_walk(root: Path) -> tuple[PackedPaths, Counter[str]]:
    """What `walk` finds, from the cache if each folder is as it was then.

    A file or folder that came, went or was renamed, and another target of a linked folder, are noticed. A file that is
    rewritten in place is not, nor does it matter: there are only names in the index. Not remembered is what was found
    quickly, a tree that was changed in the two seconds before, and one with unreadable folders.
    """
    file = _cache_file(root)
    if file and (remembered := _remembered(file, root)) is not None:
        return remembered
    start, now = time.perf_counter(), time.time_ns()
    tree = walk_images(root)
    settled = tree.youngest < now - _SETTLED_NS and not tree.ignored["unreadable folder"]
    if file and settled and time.perf_counter() - start > _WORTH_S:
        # The cache cannot be written to, has no locks, or another process is writing.
        with suppress(OSError, NotImplementedError):
            _remember(file, tree)
    return tree.names, tree.ignored


def cache_dir() -> Path | None:
    """Our folder in the user's cache; None where the user has no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 - never raises
    return folder / "ssl-vit" if folder.is_absolute() else None


def _cache_file(root: Path) -> Path | None:
    digest = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()
    cache = cache_dir()
    return cache / "index" / f"{digest}.safetensors" if cache else None


def _remember(file: Path, tree: WalkResult) -> None:
    """One list of names: the images, the folders, and as the last one a JSON text of what else there is to know."""
    facts = {"kind": _KIND, "images": len(tree.names), "ignored": tree.ignored, "state": tree.state}
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=0):
        PackedPaths.from_iterable(chain(tree.names, tree.folders, [json.dumps(facts).encode()])).save(file)


def _remembered(file: Path, root: Path) -> tuple[PackedPaths, Counter[str]] | None:
    try:
        every = PackedPaths.load(file)
        facts = json.loads(every[-1])
        if facts["kind"] != _KIND:
            return None
    except (OSError, ValueError, LookupError, TypeError):  # absent, damaged, or of something else
        return None
    dataset = facts["images"]
    folders = every.slice(dataset, len(every) - 1)
    if directory_fingerprint(root, folders) != facts["state"]:
        return None
    return every.slice(0, dataset), Counter(facts["ignored"])
