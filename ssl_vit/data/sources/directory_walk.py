"""The files below a folder: found by several threads, because on model disks each folder is waited for."""

from __future__ import annotations

import hashlib
import heapq
import os
import stat
from bisect import bisect
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from ssl_vit.data.dataset import escape_path
from ssl_vit.data.sources.decode import EXTENSIONS
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.runtime.progress import progress_bar
from ssl_vit.runtime.workers import PROGRESS_DELAY, map_ordered

THREADS = 16  # waiting for folders
_AHEAD = 4 * THREADS  # folders under way
_STAMPS_AT_ONCE = 256  # folders looked at by one task

_ONE_READS = Lock()  # reading entries that are there gives way to another thread at each of them, which costs more
_SUFFIXES = frozenset(map(os.fsencode, EXTENSIONS))


class WalkResult(NamedTuple):
    """What lies below a folder."""

    names: PackedPaths  # of the images, sorted
    ignored: Counter[str]  # what else there is, by extension
    folders: PackedPaths  # each that was come upon, and links that might become one
    state: str  # of these folders, as `directory_fingerprint` gives it
    youngest: int  # the last time at which one of them was changed, in ns since 1970


class _Folder:
    """One folder, as it is read.

    Args:
        path: Relative to the root, with a slash at its end.
        status: Asked for before reading: a change meanwhile makes it out of date.
    """

    def __init__(self, path: bytes, status: os.stat_result) -> None:
        self.path = path
        self.status = status
        self.dataset: list[bytes] = []  # names
        self.ignored: Counter[bytes] = Counter()  # files by extension
        self.hidden = 0
        self.subfolders: list[bytes] = []  # paths like this folder's
        self.links: list[bytes] = []  # to folders, likewise
        self.other_links: list[bytes] = []  # neither to folders nor named like images, likewise

    def add(self, entry: os.DirEntry[bytes], *, link: bool) -> None:
        """Put the entry where it belongs."""
        name = entry.name
        _, dot, suffix = name.lower().rpartition(b".")
        if name.startswith(b"."):
            self.hidden += 1
        elif _is_folder(entry):
            (self.links if link else self.subfolders).append(self.path + name + b"/")
        elif dot + suffix in _SUFFIXES and (link or entry.is_file()):
            self.dataset.append(name)
        else:
            self.ignored[dot and dot + suffix] += 1
            if link:
                self.other_links.append(self.path + name + b"/")

    def runs(self) -> list[bytes]:
        """The images' paths, sorted, NUL between them, cut where a subfolder's sort in between."""
        self.dataset.sort()
        below = len(self.path)
        cuts = {bisect(self.dataset, folder[below:]) for folder in self.subfolders + self.links}
        bounds = sorted(cuts | {0, len(self.dataset)})
        return [self.path + (b"\0" + self.path).join(self.dataset[start:stop]) for start, stop in pairwise(bounds)]


def walk_images(root: Path) -> WalkResult:
    """Images below a folder as sorted relative paths, and counts of what else there is.

    Links to folders are followed, each folder is visited once: loops end, and an image has one path, the one without
    a link if there is one. Links are followed one after the other, the folders below each by several threads.
    """
    runs: list[bytes] = []
    ignored: Counter[bytes] = Counter()
    hidden = unreadable = youngest = 0
    visited: set[tuple[int, int]] = set()
    seen: list[bytes] = []
    state = hashlib.sha256()
    folders, linked = [b""], list[bytes]()  # still to visit, each with a slash at its end
    bar = progress_bar(desc="finding images", unit="", delay=PROGRESS_DELAY, leave=False, show=is_rank_zero())
    with bar, ThreadPoolExecutor(THREADS) as threads:
        while folders or linked:
            level = sorted(folders) or [heapq.heappop(linked)]
            folders = []
            read = map_ordered(threads, partial(_read_folder, os.fsencode(root)), level, ahead=_AHEAD)
            for path, folder in zip(level, read, strict=True):
                if folder is None:
                    unreadable += 1
                    continue
                seen.append(path)
                state.update(_stamp(path, folder.status))
                youngest = max(youngest, folder.status.st_mtime_ns)
                identity = folder.status.st_dev, folder.status.st_ino
                if identity in visited:
                    continue
                visited.add(identity)
                runs += folder.runs()
                ignored += folder.ignored
                hidden += folder.hidden
                folders += folder.subfolders
                for link in folder.links:
                    heapq.heappush(linked, link)
                for link in folder.other_links:
                    seen.append(link)
                    state.update(_stamp(link, None))
                bar.update(len(folder.dataset))
    runs.sort()
    names = PackedPaths.from_iterable(name for run in runs for name in run.split(b"\0"))
    return WalkResult(
        names, _kinds(ignored, hidden, unreadable), PackedPaths.from_iterable(seen), state.hexdigest(), youngest
    )


def directory_fingerprint(root: Path, folders: PackedPaths) -> str:
    """A hash of the folders' paths, identities, and times of change as they are now."""
    chunks = (folders.slice(i, min(i + _STAMPS_AT_ONCE, len(folders))) for i in range(0, len(folders), _STAMPS_AT_ONCE))
    state = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:
        for stamps in map_ordered(threads, partial(_stamps, os.fsencode(root)), chunks, ahead=_AHEAD):
            state.update(stamps)
    return state.hexdigest()


def _read_folder(root: bytes, path: bytes) -> _Folder | None:
    """The folder, or None if it cannot be read."""
    whole = os.path.join(root, path)  # noqa: PTH118 - bytes
    links = []
    try:
        folder = _Folder(path, os.stat(whole))  # noqa: PTH116 - bytes
        entries = iter(os.scandir(whole))
        first = list(islice(entries, 1))  # the disk is waited for here
        with _ONE_READS:
            for entry in chain(first, entries):
                if entry.is_symlink():
                    links.append(entry)
                else:
                    folder.add(entry, link=False)
    except OSError:
        return None
    for entry in links:  # what they lead to is waited for
        folder.add(entry, link=True)
    return folder


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stamps(root: bytes, folders: PackedPaths) -> bytes:
    """Of several folders, one behind the other."""
    return b"".join(_stamp(folder, _folder_status(os.path.join(root, folder))) for folder in folders)  # noqa: PTH118


def _folder_status(path: bytes) -> os.stat_result | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - bytes
    except OSError:
        return None
    return status if stat.S_ISDIR(status.st_mode) else None


def _stamp(folder: bytes, status: os.stat_result | None) -> bytes:
    """Other bytes when another folder has the path, or a file came, went, or changed its name in it."""
    if status is None:
        return folder + b"\0\0"
    # Copying programs set the first time back, nobody the second. The device's number differs from machine to machine.
    return b"%b\0%d %d %d\0" % (folder, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _kinds(ignored: Counter[bytes], hidden: int, unreadable: int) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for suffix, count in ignored.items():
        kinds[escape_path(suffix) or "without extension"] += count
    kinds += Counter({"hidden": hidden, "unreadable folder": unreadable})
    return kinds
