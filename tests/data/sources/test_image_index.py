"""The index of a folder: complete, sorted, packed, and remembered only as long as it is true."""

import os
import random
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.numpy import save_file

from ssl_vit.data.dataset import UnreadableImageError, escape_path
from ssl_vit.data.sources import image_index as index
from ssl_vit.data.sources.image_folder import ImageFolder, labels_from_folders, read_image_list, scan_image_folder
from ssl_vit.data.sources.image_index import cached_walk, walk_images
from ssl_vit.data.sources.packed_paths import PackedPaths

LONG_AGO = 1_500_000_000  # seconds since 1970


def put(root, *names):
    paths = [root / os.fsdecode(name) for name in names]
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.touch()


def settle(root):
    """As if no folder had been changed lately."""
    for folder, *_ in os.walk(root):
        os.utime(folder, (LONG_AGO, LONG_AGO))


@pytest.fixture
def walks(tmp_path, monkeypatch):
    """A list of the folders that were walked through; everything is remembered, in a cache of the test's own."""
    roots = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(index, "walk_images", lambda root: (roots.append(root), walk_images(root))[1])
    return roots


@pytest.fixture
def root(tmp_path, walks):
    """A settled folder, whose index is in the cache."""
    put(tmp_path / "root", "a/1.png", "a/2.png", "a/deep/3.png", "b/4.png", "b/notes.txt", ".hidden/5.png")
    put(tmp_path / "outside", "6.png")
    put(tmp_path / "first", "7.png")
    put(tmp_path / "second", "8.png")
    (tmp_path / "current").symlink_to(tmp_path / "first")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "moving").symlink_to(tmp_path / "current")
    (tmp_path / "root" / "not-yet").symlink_to(tmp_path / "a disk")
    settle(tmp_path)
    cached_walk(tmp_path / "root")
    walks.clear()
    return tmp_path / "root"


def cache_files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


# --- what is found ---------------------------------------------------------------------------------------------


def random_tree(rng, depth=3):
    """Names that sort in unlike ways as names and as parts of paths."""
    names = ["".join(rng.choices("a-0.", k=rng.randint(1, 3))).strip(".") or "a" for _ in range(rng.randint(1, 6))]
    for name in names:
        if depth and rng.random() < 0.5:
            yield from (f"{name}_/{below}" for below in random_tree(rng, depth - 1))
        else:
            yield name + ".png"


@pytest.mark.parametrize("seed", range(8))
def test_walk_images_finds_all_paths_sorted_as_bytes(tmp_path, seed):
    expected = sorted({os.fsencode(name) for name in random_tree(random.Random(seed))})
    put(tmp_path, *expected)
    assert walk_images(tmp_path).names == expected


def test_walk_images_sorts_files_and_folders_of_similar_names(tmp_path):
    expected = [b"a-b/1.png", b"a.png", b"a.png.d/1.png", b"a/0.png", b"a/b/1.png", b"a/b0.png", b"a0.png", b"a0/1.png"]
    put(tmp_path, *expected)
    assert walk_images(tmp_path).names == expected


def test_cached_walk_of_twenty_thousand_files_is_fast_packed_and_cached(tmp_path, walks):
    expected = [f"class {i % 20:02d}/image {i:05d}.jpg" for i in range(20_000)]
    put(tmp_path / "root", *expected)
    settle(tmp_path / "root")
    start = time.perf_counter()
    fresh, again = (scan_image_folder(tmp_path / "root") for _ in range(2))
    assert time.perf_counter() - start < 5
    assert len(walks) == 1
    assert fresh.names == again.names == [os.fsencode(name) for name in sorted(expected)]
    assert fresh.names.text.nbytes + fresh.names.ends.nbytes == sum(map(len, expected)) + 8 * 20_001
    assert torch.equal(fresh.labels, torch.arange(20).repeat_interleave(1000))
    assert torch.equal(fresh.labels, again.labels)


def slow_class_folders(names):
    first = [os.fsdecode(name.partition(b"/")[0]) if b"/" in name else "" for name in names]
    classes = sorted(set(first))
    if "" in classes or {"train", "val", "test"}.issuperset(classes):
        return [-1] * len(names), []
    return [classes.index(name) for name in first], classes


@pytest.mark.parametrize(
    "names",
    [
        [b"a-b/1", b"a/1", b"a/2/3", b"a0/1"],
        [b"a/1", b"stray"],
        [b"stray", b"z/1"],
        [b"test/1", b"train/a/1"],
        [b"train/1", b"truck/1"],
        [b"only/1", b"only/2"],
        [b"caf\xe9/1", "caf\N{LATIN SMALL LETTER E WITH ACUTE}/1".encode(), "\N{GRINNING FACE}/1".encode()],
    ],
)
def test_labels_from_folders_equals_the_textbook_form(names):
    labels, classes = labels_from_folders(PackedPaths.from_iterable(sorted(names)))
    slow_labels, slow_classes = slow_class_folders(sorted(names))
    assert labels.tolist() == slow_labels
    assert classes == [escape_path(name) for name in slow_classes]


# --- what is remembered ----------------------------------------------------------------------------------------


def test_cached_walk_equals_a_walk(root, walks):
    tree = walk_images(root)
    names, ignored = cached_walk(root)
    assert walks == []
    assert (names, ignored) == (tree.names, tree.ignored)
    assert names == [b"a/1.png", b"a/2.png", b"a/deep/3.png", b"b/4.png", b"linked/6.png", b"moving/7.png"]
    assert ignored == {".txt": 1, "hidden": 1, "without extension": 1}


def retarget(root):
    (root.parent / "current").unlink()
    (root.parent / "current").symlink_to(root.parent / "second")


def swap(root):
    (root / "a").rename(root.parent / "aside")
    (root / "b").rename(root / "a")
    (root.parent / "aside").rename(root / "b")
    os.utime(root, (LONG_AGO, LONG_AGO))


def add_and_set_the_clock_back(root):
    time.sleep(0.02)  # beyond a tick of the file system's clock
    put(root, "a/new.png")
    os.utime(root / "a", (LONG_AGO, LONG_AGO))


@pytest.mark.parametrize(
    ("change", "gone", "new"),
    [
        (lambda root: put(root, "a/deep/new.png"), set(), {b"a/deep/new.png"}),
        (lambda root: put(root, "new.png"), set(), {b"new.png"}),
        (lambda root: put(root, "new/folder/1.png"), set(), {b"new/folder/1.png"}),
        (lambda root: put(root, "../outside/new.png"), set(), {b"linked/new.png"}),
        (lambda root: put(root, "../a disk/new.png"), set(), {b"not-yet/new.png"}),
        (lambda root: (root / "b/4.png").unlink(), {b"b/4.png"}, set()),
        (lambda root: (root / "a/1.png").rename(root / "a/new.png"), {b"a/1.png"}, {b"a/new.png"}),
        (lambda root: (root / "a/1.png").rename(root / "b/1.png"), {b"a/1.png"}, {b"b/1.png"}),
        (lambda root: (root / "a/deep").rename(root / "deep"), {b"a/deep/3.png"}, {b"deep/3.png"}),
        (
            swap,
            {b"a/1.png", b"a/2.png", b"a/deep/3.png", b"b/4.png"},
            {b"b/1.png", b"b/2.png", b"b/deep/3.png", b"a/4.png"},
        ),
        (lambda root: (root / "linked").unlink(), {b"linked/6.png"}, set()),
        (retarget, {b"moving/7.png"}, {b"moving/8.png"}),
        (add_and_set_the_clock_back, set(), {b"a/new.png"}),
    ],
)  # fmt: skip
def test_cached_walk_notices_every_change(root, walks, change, gone, new):
    before = set(cached_walk(root)[0])
    assert walks == []
    change(root)
    after = cached_walk(root)[0]
    assert len(walks) == 1
    assert (before - set(after), set(after) - before) == (gone, new)
    assert after == walk_images(root).names


def test_cached_walk_notices_a_file_in_a_formerly_empty_folder(root, walks):
    (root / "empty").mkdir()
    settle(root)
    before = cached_walk(root)[0]
    assert cached_walk(root)[0] == before
    assert len(walks) == 1
    put(root, "empty/1.png")
    assert list(cached_walk(root)[0])[-3:] == [b"empty/1.png", b"linked/6.png", b"moving/7.png"]
    assert len(walks) == 2


def test_cached_walk_stays_valid_when_a_file_is_rewritten(root, walks):
    before = scan_image_folder(root)
    names, sizes = before.fingerprint(sizes=False), before.fingerprint(sizes=True)
    (root / "a" / "1.png").write_bytes(b"longer")
    after = scan_image_folder(root)
    assert walks == []
    assert after.fingerprint(sizes=False) == names
    assert after.fingerprint(sizes=True) != sizes


def test_cached_walk_does_not_cache_recent_changes(root, walks, tmp_path):
    (file,) = cache_files(tmp_path)
    file.unlink()
    put(root, "new.png")
    for count in (1, 2):  # another change within the same tick of the clock could not be told from this one
        assert cached_walk(root)[0][-1] == b"new.png"
        assert len(walks) == count
    assert cache_files(tmp_path) == []


def test_cached_walk_does_not_cache_fast_walks(tmp_path, walks, monkeypatch):
    monkeypatch.setattr(index, "_MIN_SECONDS", 60.0)
    put(tmp_path / "root", "1.png")
    settle(tmp_path / "root")
    assert cached_walk(tmp_path / "root")[0] == cached_walk(tmp_path / "root")[0] == [b"1.png"]
    assert len(walks) == 2
    assert not (tmp_path / "cache").exists()


def test_cached_walk_does_not_cache_trees_with_unreadable_folders(root, walks, monkeypatch):
    put(root, "locked/1.png")
    settle(root)
    scandir = os.scandir

    def locked(path):
        if path.endswith(b"locked/"):
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert cached_walk(root)[1]["unreadable folder"] == 1
    monkeypatch.setattr(os, "scandir", scandir)
    names, ignored = cached_walk(root)
    assert b"locked/1.png" in list(names)
    assert "unreadable folder" not in ignored


def test_cached_walk_caches_each_folder_separately(root, walks):
    below = cached_walk(root / "a")[0]
    assert below == [b"1.png", b"2.png", b"deep/3.png"]
    assert cached_walk(root / "a")[0] == below
    assert cached_walk(root)[0][0] == b"a/1.png"
    assert walks == [root / "a"]


def test_cached_walk_resolves_relative_paths(root, walks, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert cached_walk(root.relative_to(root.parent))[0] == walk_images(root).names
    assert walks == []


# --- caches that are no good -----------------------------------------------------------------------------------


def flip(file):
    content = bytearray(file.read_bytes())
    content[content.index(b"deep/3") + 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: file.write_bytes(os.urandom(1000)),
        flip,
        lambda file: save_file({"text": np.zeros(3, np.uint8)}, file),
        lambda file: PackedPaths.from_iterable([b"a/1.png", b"no JSON"]).save(file),
        lambda file: PackedPaths.from_iterable([b"a/1.png", b'["a list"]']).save(file),
        lambda file: PackedPaths.from_iterable([b"a/1.png", b'{"kind": "of another version"}']).save(file),
        lambda file: PackedPaths.from_iterable([]).save(file),
    ],
)
def test_cached_walk_rewrites_a_damaged_or_foreign_cache(root, walks, tmp_path, damage):
    (file,) = cache_files(tmp_path)
    good = cached_walk(root)
    damage(file)
    assert cached_walk(root) == good
    assert len(walks) == 1
    assert cached_walk(root) == good
    assert len(walks) == 1


@pytest.mark.parametrize("cache", ["a file", "a file/below", "/proc/none"])
def test_cached_walk_works_without_a_writable_cache(root, walks, tmp_path, monkeypatch, cache):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    assert cached_walk(root) == cached_walk(root)
    assert len(walks) == 2


def test_cached_walk_without_a_home_writes_nothing(root, walks, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")  # what is left where `~` stands for nothing
    assert cached_walk(root) == cached_walk(root)
    assert len(walks) == 2
    assert list(work.iterdir()) == []


def test_cached_walk_does_not_wait_for_another_writer(root, walks, tmp_path):
    (file,) = cache_files(tmp_path)
    file.unlink()
    with FileLock(file.with_suffix(".lock")):
        names = cached_walk(root)[0]
    assert len(names) == 6
    assert cache_files(tmp_path) == []


def test_cached_walk_is_safe_with_concurrent_writers(root, tmp_path):
    (file,) = cache_files(tmp_path)
    expected = walk_images(root).names
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=find_often, args=(root, file, expected)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(PackedPaths.load(file)) > 6
    assert list(file.parent.glob(".*.tmp")) == []


def find_often(root, file, expected):
    for i in range(30):
        if i % 3 == 0:
            file.unlink(missing_ok=True)
        assert cached_walk(root)[0] == expected
        if file.exists():
            try:
                PackedPaths.load(file)  # never half a file
            except FileNotFoundError:
                continue
    cached_walk(root)


def test_cached_walk_keeps_any_file_name_byte_by_byte(tmp_path, walks):
    odd = [b"caf\xe9/1.png", b"new\nline/2\r\n.png", "\N{GRINNING FACE}/ 3 .png".encode(), b"\xff\xfe/\x01.png"]
    put(tmp_path / "root", *odd)
    settle(tmp_path / "root")
    fresh, again = (scan_image_folder(tmp_path / "root") for _ in range(2))
    assert len(walks) == 1
    assert fresh.names == again.names == sorted(odd)
    assert fresh.classes == again.classes
    assert len(set(again.classes)) == 4
    assert all(again.path(i).exists() for i in range(4))


# --- names and lists -------------------------------------------------------------------------------------------


def test_packed_paths_slice_save_and_load(tmp_path):
    single = [b"x" * (i % 7) + b"%d" % i for i in range(9000)] + [b""]
    names = PackedPaths.from_iterable(iter(single))
    assert len(names) == 9001
    assert names == single
    assert [names[i] for i in (0, 4095, 4096, 9000)] == [single[i] for i in (0, 4095, 4096, 9000)]
    for start, stop in pairwise((0, 0, 17, 5000, 9001)):
        assert names.slice(start, stop) == single[start:stop]
        assert names.slice(start, stop).fingerprint() == PackedPaths.from_iterable(single[start:stop]).fingerprint()
    names.save(tmp_path / "names.safetensors")
    loaded = PackedPaths.load(tmp_path / "names.safetensors")
    assert loaded == names
    assert loaded.fingerprint() == names.fingerprint()
    assert names != PackedPaths.from_iterable(reversed(single))
    assert names != single[1:]


def test_packed_paths_load_refuses_other_files(tmp_path):
    path = tmp_path / "names.safetensors"
    with pytest.raises(FileNotFoundError):
        PackedPaths.load(path)
    PackedPaths.from_iterable([b"one", b"two"]).save(path)
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    with pytest.raises(ValueError, match="checksum"):
        PackedPaths.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"names\.safetensors"):
        PackedPaths.load(path)
    save_file({"other": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no names"):
        PackedPaths.load(path)


def test_with_names_gives_a_run_its_own_image_list(root, tmp_path):
    before = scan_image_folder(root)
    before.names.save(tmp_path / "image_list.safetensors")
    put(root, "a/new.png")
    (root / "b" / "4.png").unlink()
    own = ImageFolder(root, PackedPaths.load(tmp_path / "image_list.safetensors"), ignored=Counter(), labeled=True)
    assert own.fingerprint(sizes=False) == before.fingerprint(sizes=False)
    assert torch.equal(own.labels, before.labels)
    assert own.classes == before.classes == ["a", "b", "linked", "moving"]
    assert own.extensions == {".png": 6}
    with pytest.raises(UnreadableImageError, match=r"b/4\.png: No such file"):
        own.read(3, 3)


def test_read_image_list_takes_any_line_ends(tmp_path):
    ends = (b"\n", b"\r\n", b"\r", b"\n \n")
    (tmp_path / "0.png").touch()  # a list of nothing that exists is refused
    (tmp_path / "list.txt").write_bytes(b"".join(b"%d.png%b" % (i, ends[i % 4]) for i in range(10_000)))
    dataset = read_image_list(tmp_path / "list.txt")
    assert dataset.names == [b"%d.png" % i for i in range(10_000)]
    assert dataset.labels.unique().tolist() == [-1]
