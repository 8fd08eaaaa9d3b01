"""atomic_write and write_json: a file is complete or absent, and a failure keeps the old one."""

import errno
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from ssl_vit.runtime.atomic_io import atomic_write, lock_file, write_json
from ssl_vit.runtime.errors import UserError


def test_write_json_does_not_replace_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_json(pipe, {})
    assert pipe.is_fifo()


def test_atomic_write_replaces_the_old_file_at_once(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"first", b"second, longer"):
        with atomic_write(path) as file:
            file.write(content[:3])
            assert not path.exists() or path.read_bytes() == b"first"
            file.write(content[3:])
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"good")
    with pytest.raises(OSError, match="No space") as failure, atomic_write(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failure.value.filename == str(path)
    assert path.read_bytes() == b"good"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_atomic_write_overwrites_the_temporary_file_of_a_killed_process(tmp_path):
    (tmp_path / ".a.bin.tmp").write_bytes(b"x" * 1000)
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"new")]


def test_atomic_write_syncs_content_before_rename_and_directory_after(tmp_path, monkeypatch):
    """Otherwise a power loss may leave an empty file under the final name."""
    path, order = tmp_path / "a.bin", []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content"
        order.append(f"{kind}, {'named' if path.exists() else 'not named yet'}, {os.fstat(descriptor).st_size >= 4}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))[1])
    with atomic_write(path) as file:
        file.write(b"four")
    assert order == ["content, not named yet, True", "rename", "folder, named, True"]


def test_write_json_keeps_undecodable_file_names(tmp_path):
    content = {"path": os.fsdecode(b"caf\xe9 \xf0\x9f\x98\x80\n"), "n": [1, None, 0.5]}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content


def test_lock_file_names_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="no file locks"), lock_file(tmp_path / ".lock"):
        pass
