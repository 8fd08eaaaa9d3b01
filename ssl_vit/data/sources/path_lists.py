"""Read text files that list images or videos, one per line, in the encodings that other tools write."""

from __future__ import annotations

import codecs
import logging
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from ssl_vit.data.dataset import escape_path
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.text import pluralize

log = logging.getLogger(__name__)

_CHECKED = 16  # first paths, one of which must exist
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_paths(file: Path) -> list[bytes]:
    """Return the paths of a list in its order, each once: absolute, or relative to the folder of the list.

    Raises:
        UserError: The list is empty, is no text, or none of its first paths exists.
    """
    lines = [line for line in _read_bytes(file).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{escape_path(file.absolute())}: there is no path in this list")
    folder = os.fsencode(file.parent)
    if not any(os.path.lexists(os.path.join(folder, line)) for line in lines[:_CHECKED]):  # noqa: PTH118 - bytes
        raise UserError(
            f"{escape_path(file.absolute())}: none of its first paths exists, such as {escape_path(lines[0])}"
            f"{_explain(folder, lines[0])}; expected one path per line, absolute or relative to the folder of the list"
        )
    paths = list(dict.fromkeys(lines))
    if len(paths) < len(lines):
        log.warning(f"{escape_path(file)}: {pluralize(len(lines) - len(paths), 'path')} listed again, used once")
    return paths


def read_names(file: Path) -> list[str]:
    """Return the first word of each line: names of files or folders inside a dataset.

    Raises:
        UserError: A name is absolute or leads out of the dataset.
    """
    names = [line.split()[0] for line in os.fsdecode(_read_bytes(file)).splitlines() if line.strip()]
    for name in names:
        check_name_inside(name, file)
    return names


def check_name_inside(name: str, source: Path) -> None:
    """Check that a name from a file stays inside the folder that it is joined to.

    Raises:
        UserError: It is absolute, or has `..`, a backslash or a NUL character.
    """
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or ".." in windows.parts or "\0" in name or "\\" in name:
        raise UserError(f"{source}: {escape_path(name)} leads out of the dataset; expected names of its own files")


def _read_bytes(file: Path) -> bytes:
    """Return the content of a text file without byte order mark, UTF-16 as UTF-8."""
    content = file.read_bytes()
    if content.startswith(_UTF16):
        try:
            return content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise UserError(f"{escape_path(file.absolute())}: no valid UTF-16: {error}") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _explain(folder: bytes, line: bytes) -> str:
    """Return what would make the path exist, where that is simple."""
    first = line.split(None, 1)[0].partition(b",")[0]
    for reason, path in {
        "blanks at its end": line.rstrip(),
        "quotes around it": line.strip(b"\"' "),
        "backslashes": line.replace(b"\\", b"/"),
        "a label or another column after it": first,
        "a ~ for the home folder": os.path.expanduser(line),  # noqa: PTH111 - bytes
    }.items():
        if path != line and os.path.lexists(os.path.join(folder, path)):  # noqa: PTH118 - bytes
            return f" (it has {reason})"
    return ""
