"""Find the images below a folder with several threads, and cache the result between runs if that takes long."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import stat
import time
from bisect import bisect
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from filelock import FileLock
from tqdm import tqdm

from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.file_kinds import EXTENSIONS
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.runtime.outputs import RUN_MARKER, RUN_MARKER_TEXT
from ssl_vit.runtime.workers import PROGRESS_DELAY, map_ordered

THREADS = 16  # each waits for a folder of a network disk
_AHEAD = 4 * THREADS  # folders in flight
_STAMP_CHUNK = 256  # folders per task of `directory_fingerprint`

_READ_LOCK = Lock()  # listing a cached folder switches threads at every entry, which costs more than waiting here
_SUFFIXES = frozenset(map(os.fsencode, EXTENSIONS))

# Thumbnails and deleted files.
_SYSTEM_FOLDERS = frozenset({b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information"})

REPEATED_FOLDER = "second path to a folder"  # a kind of ignored entries

_MIN_SECONDS = 1.0  # faster walks are not cached
_SETTLED_NS = 2_000_000_000  # tick of the coarsest file system clock, within which two changes look like one
_KIND = f"ssl-vit index 2 {' '.join(sorted(EXTENSIONS))}"  # another version may look for other images


class WalkResult(NamedTuple):
    """What is below a folder."""

    names: PackedPaths  # of the images, relative to the folder, sorted
    ignored: Counter[str]  # number of other files by extension
    folders: PackedPaths  # all visited folders, and links that might become folders
    state: str  # their `directory_fingerprint`
    last_change: int  # latest modification time of a folder, in ns since 1970


def cached_walk(root: Path) -> tuple[PackedPaths, Counter[str]]:
    """Return the images and the ignored files of `walk_images`, from the cache if no folder has changed.

    Added, removed and renamed files and folders and changed targets of linked folders are noticed. Files rewritten in
    place are not, and need not be: the index has only names. Not cached are fast walks, trees that changed within the
    last two seconds, and trees with unreadable folders.
    """
    file = _cache_file(root)
    if file and (cached := _load_cached(file, root)) is not None:
        return cached
    start, now = time.perf_counter(), time.time_ns()
    result = walk_images(root)
    settled = result.last_change < now - _SETTLED_NS and not result.ignored["unreadable folder"]
    if file and settled and time.perf_counter() - start > _MIN_SECONDS:
        # The cache cannot be written, has no locks, or another process is writing.
        with suppress(OSError, NotImplementedError):
            _save_cached(file, result)
    return result.names, result.ignored


def cache_dir() -> Path | None:
    """Return this package's folder in the user's cache; None if the user has no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 - never raises
    return folder / "ssl-vit" if folder.is_absolute() else None


def walk_images(root: Path) -> WalkResult:
    """Find the images below a folder as sorted relative paths, and count all other files.

    Links to folders are followed and each folder is visited once: loops end, and an image has one path, the one
    without a link if possible. Links are followed one by one, the folders below each by several threads.
    """
    runs: list[bytes] = []
    ignored: Counter[bytes] = Counter()
    hidden = unreadable = repeated = own = last_change = 0
    visited: set[tuple[int, int]] = set()
    seen: list[bytes] = []
    state = hashlib.sha256()
    folders, linked = [b""], list[bytes]()  # still to visit, each with a slash at its end
    bar = tqdm(
        desc="finding images", unit="", delay=PROGRESS_DELAY, leave=False, disable=None if is_rank_zero() else True
    )
    with bar, ThreadPoolExecutor(THREADS) as threads:
        while folders or linked:
            level = sorted(folders) or [heapq.heappop(linked)]
            folders = []
            listings = map_ordered(threads, partial(_list_folder, os.fsencode(root)), level, ahead=_AHEAD)
            for path, folder in zip(level, listings, strict=True):
                if folder is None:
                    unreadable += 1
                    continue
                seen.append(path)
                state.update(_stamp(path, folder.status))
                last_change = max(last_change, folder.status.st_mtime_ns)
                identity = folder.status.st_dev, folder.status.st_ino
                if identity in visited:
                    repeated += 1
                    continue
                visited.add(identity)
                if path and folder.ignored[b".txt"] and _is_run(os.path.join(os.fsencode(root), path)):  # noqa: PTH118 - bytes
                    own += 1
                    continue
                runs += folder.sorted_runs()
                ignored += folder.ignored
                hidden += folder.hidden
                folders += folder.subfolders
                for link in folder.links:
                    heapq.heappush(linked, link)
                for link in folder.other_links:
                    seen.append(link)
                    state.update(_stamp(link, None))
                bar.update(len(folder.images))
    runs.sort()
    names = PackedPaths.from_iterable(name for run in runs for name in run.split(b"\0"))
    kinds = Counter({"hidden": hidden, "unreadable folder": unreadable, REPEATED_FOLDER: repeated, "run": own})
    for suffix, count in ignored.items():
        kinds[escape_path(suffix) or "without extension"] += count
    return WalkResult(names, +kinds, PackedPaths.from_iterable(seen), state.hexdigest(), last_change)


def _is_run(folder: bytes) -> bool:
    """Return whether a folder is a run directory, whose figures are no images of the dataset."""
    try:
        with open(os.path.join(folder, RUN_MARKER.encode()), "rb") as file:  # noqa: PTH118, PTH123 - bytes
            return file.read(len(RUN_MARKER_TEXT)) == RUN_MARKER_TEXT.encode()
    except OSError:
        return False


def is_hidden(name: bytes) -> bool:
    """Return whether a file or folder of this name is never searched for images."""
    return name.startswith(b".") or name in _SYSTEM_FOLDERS


def directory_fingerprint(root: Path, folders: PackedPaths) -> str:
    """Hash the paths, identities and modification times of folders as they are now."""
    starts = range(0, len(folders), _STAMP_CHUNK)
    chunks = (folders.slice(start, min(start + _STAMP_CHUNK, len(folders))) for start in starts)
    state = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:
        for stamps in map_ordered(threads, partial(_stamps, os.fsencode(root)), chunks, ahead=_AHEAD):
            state.update(stamps)
    return state.hexdigest()


@dataclass
class _Folder:
    """The entries of one folder."""

    path: bytes  # relative to the root, with a slash at its end
    status: os.stat_result  # from before listing: a change in between makes it outdated
    images: list[bytes] = field(default_factory=list)  # names
    ignored: Counter[bytes] = field(default_factory=Counter)  # files by extension
    hidden: int = 0
    subfolders: list[bytes] = field(default_factory=list)  # paths relative to the root, with a slash at their end
    links: list[bytes] = field(default_factory=list)  # to folders, likewise
    other_links: list[bytes] = field(default_factory=list)  # neither to folders nor named like images, likewise

    def add(self, entry: os.DirEntry[bytes], *, link: bool) -> None:
        name = entry.name
        _, dot, suffix = name.lower().rpartition(b".")
        if is_hidden(name):
            self.hidden += 1
        elif _is_folder(entry):
            (self.links if link else self.subfolders).append(self.path + name + b"/")
        elif dot + suffix in _SUFFIXES and (link or entry.is_file()):
            self.images.append(name)
        else:
            self.ignored[dot and dot + suffix] += 1
            if link:
                self.other_links.append(self.path + name + b"/")

    def sorted_runs(self) -> list[bytes]:
        """Return the images' paths, sorted and joined with NUL, split where a subfolder sorts in between."""
        self.images.sort()
        below = len(self.path)
        splits = {bisect(self.images, folder[below:]) for folder in self.subfolders + self.links}
        bounds = sorted(splits | {0, len(self.images)})
        return [self.path + (b"\0" + self.path).join(self.images[start:stop]) for start, stop in pairwise(bounds)]


def _list_folder(root: bytes, path: bytes) -> _Folder | None:
    """List a folder; None if it cannot be read."""
    whole = os.path.join(root, path)  # noqa: PTH118 - bytes
    links = []
    try:
        folder = _Folder(path, os.stat(whole))  # noqa: PTH116 - bytes
        entries = iter(os.scandir(whole))
        first = list(islice(entries, 1))  # waits for the disk
        with _READ_LOCK:
            for entry in chain(first, entries):
                if entry.is_symlink():
                    links.append(entry)
                else:
                    folder.add(entry, link=False)
    except OSError:
        return None
    for entry in links:  # waits for their targets
        folder.add(entry, link=True)
    return folder


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stamps(root: bytes, folders: PackedPaths) -> bytes:
    stamps = []
    for folder in folders:
        try:
            status = os.stat(os.path.join(root, folder))  # noqa: PTH116, PTH118 - bytes
        except OSError:
            status = None
        stamps.append(_stamp(folder, status if status and stat.S_ISDIR(status.st_mode) else None))
    return b"".join(stamps)


def _stamp(folder: bytes, status: os.stat_result | None) -> bytes:
    """Return bytes that differ if another folder has this path, or files in it were added, removed or renamed."""
    if status is None:
        return folder + b"\0\0"
    # Copying programs reset the first time, none resets the second. Device numbers differ between machines.
    return b"%b\0%d %d %d\0" % (folder, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _cache_file(root: Path) -> Path | None:
    digest = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()
    cache = cache_dir()
    return cache / "index" / f"{digest}.safetensors" if cache else None


def _save_cached(file: Path, result: WalkResult) -> None:
    """Write one list of paths: the images, the folders, and last the JSON of everything else."""
    info = {"kind": _KIND, "images": len(result.names), "ignored": result.ignored, "state": result.state}
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=0):
        PackedPaths.from_iterable(chain(result.names, result.folders, [json.dumps(info).encode()])).save(file)


def _load_cached(file: Path, root: Path) -> tuple[PackedPaths, Counter[str]] | None:
    try:
        paths = PackedPaths.load(file)
        info = json.loads(paths[-1])
        if info["kind"] != _KIND:
            return None
    except (OSError, ValueError, LookupError, TypeError):  # absent, damaged or of another kind
        return None
    count = info["images"]
    if directory_fingerprint(root, paths.slice(count, len(paths) - 1)) != info["state"]:
        return None
    return paths.slice(0, count), Counter(info["ignored"])
