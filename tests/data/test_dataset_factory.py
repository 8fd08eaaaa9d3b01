"""Finding images: folders of any shape, lists, torchvision's data sets, labels, and errors that say what is there."""

import hashlib
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from ssl_vit.config.evaluate import EvalDataConfig
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.data.dataset_factory import build_dataset, build_labeled_splits
from ssl_vit.data.sources.image_folder import ImageFolder, format_counts
from ssl_vit.data.sources.image_index import walk_images
from ssl_vit.data.sources.packed_paths import PackedPaths
from ssl_vit.data.sources.torchvision_datasets import rgb_to_gray
from ssl_vit.runtime.errors import UserError


def put(root, *names, color=(10, 20, 30)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), color).save(root / name, format="PNG")


def names_of(dataset):
    return [dataset.name(i) for i in range(len(dataset))]


def labeled(**keys):
    defaults = {"source": "folder", "root": None, "train": None, "test": None, "range": None}
    others = {"batch_size": 8, "num_workers": 0, "crop_ratio": 0.875, "image_size": None}
    return EvalDataConfig(**defaults | others | keys)


# --- folders ---------------------------------------------------------------------------------------------------


def test_scan_image_folder_sorts_flat_and_nested_folders(tmp_path):
    put(tmp_path, "b.png", "a.png", "z/y/x.png", "z/a.png", "B.png")
    dataset = build_dataset("folder", tmp_path)
    assert names_of(dataset) == ["B.png", "a.png", "b.png", "z/a.png", "z/y/x.png"]
    assert dataset.labels.tolist() == [-1] * 5
    assert dataset.classes == []
    assert dataset.read(3, 3)[:, 0, 0].tolist() == [10, 20, 30]


def test_scan_image_folder_takes_extensions_in_any_case_and_counts_the_rest(tmp_path):
    put(tmp_path, "a.JPEG", "b.PnG", "c.webp", ".hidden.png", ".cache/d.png")
    for name in ("notes.txt", "more.TXT", "table.csv", "README", "a.png.part"):
        (tmp_path / name).touch()
    dataset = build_dataset("folder", tmp_path)
    assert len(dataset) == 3
    assert dataset.extensions == {".jpeg": 1, ".png": 1, ".webp": 1}
    assert dataset.ignored == {".txt": 2, "hidden": 2, ".csv": 1, "without extension": 1, ".part": 1}
    assert "3 images" in dataset.describe()
    assert "2 .txt" in dataset.describe()


def test_scan_image_folder_takes_class_folders_for_labels(tmp_path):
    put(tmp_path, "dog/1.png", "cat/deep/2.png", "cat/1.png", "ant/1.png")
    dataset = build_dataset("folder", tmp_path)
    assert dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.dtype == torch.int64
    assert dict(zip(names_of(dataset), dataset.labels.tolist(), strict=True)) == {
        "ant/1.png": 0,
        "cat/1.png": 1,
        "cat/deep/2.png": 1,
        "dog/1.png": 2,
    }


def test_scan_image_folder_has_no_labels_outside_of_class_folders(tmp_path):
    put(tmp_path / "mixed", "dog/1.png", "cat/1.png", "stray.png")
    put(tmp_path / "splits", "train/cat/1.png", "test/cat/2.png")
    for root in ("mixed", "splits"):
        dataset = build_dataset("folder", tmp_path / root)
        assert set(dataset.labels.tolist()) == {-1}
        assert dataset.classes == []


def test_scan_image_folder_finds_each_image_once_despite_link_loops(tmp_path):
    put(tmp_path, "z/real/1.png", "z/2.png", "outside/3.png")
    root = tmp_path / "z"
    (root / "up").symlink_to(root)
    (root / "real" / "again").symlink_to(root)
    (root / "another").symlink_to(root / "real")
    (root / "elsewhere").symlink_to(tmp_path / "outside")
    (root / "itself").symlink_to(root / "itself")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "copy.png").symlink_to(root / "2.png")
    dataset = build_dataset("folder", root)
    assert names_of(dataset) == ["2.png", "copy.png", "elsewhere/3.png", "real/1.png", "self.png"]
    assert dataset.read(1, 3).shape == (3, 3, 4)
    with pytest.raises(UnreadableImageError, match=r"self\.png"):
        dataset.read(4, 3)


@pytest.mark.parametrize("name", ["pipe.png", "device.png", "missing.png", "nul\0.png", "folder.png"])
def test_content_of_what_is_no_regular_file_is_an_error_and_does_not_wait(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    dataset = ImageFolder(tmp_path, PackedPaths.from_iterable([name.encode()]))
    with pytest.raises(UnreadableImageError) as caught:
        dataset.content(0)
    assert caught.value.name == dataset.name(0)


def test_scan_image_folder_does_not_hang_at_a_pipe(tmp_path):
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert names_of(build_dataset("folder", tmp_path)) == ["a.png"]


def test_image_folder_reads_files_of_any_name(tmp_path):
    strange = ["with space", "new\nline", "\N{GRINNING FACE}", os.fsdecode(b"caf\xe9"), "tab\t"]
    put(tmp_path, "plain/0.png")
    for name in strange:
        (tmp_path / name).mkdir()
        os.link(tmp_path / "plain" / "0.png", tmp_path / name / f"{name}.png")
    dataset = build_dataset("folder", tmp_path)
    assert len(dataset) == len(dataset.classes) == 6
    for i in range(6):
        assert dataset.read(i, 3).shape == (3, 3, 4)
        assert len(dataset.name(i).encode().splitlines()) == 1
        assert dataset.name(i).isprintable()


def test_scan_image_folder_refuses_folders_without_images(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        build_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match="it is empty"):
        build_dataset("folder", tmp_path)
    for i in range(12):
        (tmp_path / f"{i}.txt").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.pdf").touch()
    with pytest.raises(UserError, match=r"it holds 12 \.txt, 1 \.pdf"):
        build_dataset("folder", tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        build_dataset("folder", tmp_path / "0.txt")


def test_fingerprint_follows_names_and_sizes(tmp_path):
    put(tmp_path, "a.png", "b.png")
    first = build_dataset("folder", tmp_path).fingerprint(sizes=True)
    assert build_dataset("folder", tmp_path).fingerprint(sizes=True) == first
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    second = build_dataset("folder", tmp_path).fingerprint(sizes=True)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({first, second, build_dataset("folder", tmp_path).fingerprint(sizes=True)}) == 3


def test_format_counts_names_the_most_frequent_and_sums_up_the_rest():
    kinds = Counter({f".{i}": i for i in range(1, 12)})
    assert format_counts(kinds, limit=2) == "11 .11, 10 .10, 9 more kinds"


def test_walk_images_does_not_depend_on_the_order_of_the_disk(tmp_path, monkeypatch):
    put(tmp_path, "b/1.png", "a/2.png", "c/3.png")
    (tmp_path / "l1").symlink_to(tmp_path / "a")
    (tmp_path / "l2").symlink_to(tmp_path / "c")
    found = walk_images(tmp_path)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(scandir(path))[::-1])
    assert walk_images(tmp_path) == found
    assert found[0] == [b"a/2.png", b"b/1.png", b"c/3.png"]


# --- lists -----------------------------------------------------------------------------------------------------


def test_read_image_list_keeps_its_order_and_takes_relative_and_absolute_paths(tmp_path):
    put(tmp_path, "sub/b.png", "a.png", "other/no_extension")
    strange = os.fsdecode(b"caf\xe9 1.png")
    (tmp_path / "a.png").rename(tmp_path / strange)
    lines = [b"sub/b.png", os.fsencode(tmp_path / "other" / "no_extension"), b"", os.fsencode(strange), b"gone.png"]
    (tmp_path / "list.txt").write_bytes(b"\r\n".join(lines))
    dataset = build_dataset("list", tmp_path / "list.txt")
    assert names_of(dataset) == ["sub/b.png", str(tmp_path / "other/no_extension"), r"caf\xe9 1.png", "gone.png"]
    assert [dataset.read(i, 1).shape for i in range(3)] == [(1, 3, 4)] * 3
    with pytest.raises(UnreadableImageError, match=r"gone\.png: No such file"):
        dataset.read(3, 3)
    assert len(dataset.fingerprint(sizes=True)) == 64


def test_read_image_list_refuses_folders_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        build_dataset("list", tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"data\.source=folder"):
        build_dataset("list", tmp_path)
    (tmp_path / "list.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no path in this list"):
        build_dataset("list", tmp_path / "list.txt")


# --- labeled sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["val", "test"])
def test_build_labeled_splits_finds_train_and_val_or_test_below_the_root(tmp_path, part):
    put(tmp_path, "train/a/1.png", "train/b/2.png", f"{part}/a/3.png", f"{part}/b/4.png", f"{part}/b/5.png")
    split = build_labeled_splits(labeled(root=tmp_path))
    assert split.train.classes == split.test.classes == ["a", "b"]
    assert split.train.labels.tolist() == [0, 1]
    assert split.test.labels.tolist() == [0, 1, 1]


def test_build_labeled_splits_takes_two_folders_or_one(tmp_path):
    put(tmp_path, "x/a/1.png", "x/b/2.png", "y/a/3.png", "y/b/4.png")
    named = build_labeled_splits(labeled(train=tmp_path / "x", test=tmp_path / "y"))
    assert len(named.train) == len(named.test) == 2
    alone = build_labeled_splits(labeled(root=tmp_path / "x"))
    assert alone.test is None
    assert alone.train.classes == ["a", "b"]
    assert build_labeled_splits(labeled(train=tmp_path / "x")).test is None


def test_build_labeled_splits_takes_train_for_a_class_without_val_or_test(tmp_path):
    put(tmp_path, "train/1.png", "car/2.png")
    split = build_labeled_splits(labeled(root=tmp_path))
    assert split.test is None
    assert split.train.classes == ["car", "train"]


def test_build_labeled_splits_refuses_unlabeled_and_different_sets(tmp_path):
    put(tmp_path, "two/train/a/1.png", "two/train/b/1.png", "two/test/a/1.png", "two/test/c/1.png")
    with pytest.raises(UserError, match="only in test: c; only in train: b"):
        build_labeled_splits(labeled(root=tmp_path / "two"))
    put(tmp_path, "flat/1.png", "flat/a/2.png")
    with pytest.raises(UserError, match=r"1\.png lies in none"):
        build_labeled_splits(labeled(root=tmp_path / "flat"))
    put(tmp_path, "one/a/1.png", "one/a/2.png")
    with pytest.raises(UserError, match="all images lie in a/"):
        build_labeled_splits(labeled(root=tmp_path / "one"))
    put(tmp_path, "both/train/a/1.png", "both/val/a/1.png", "both/test/a/1.png")
    with pytest.raises(UserError, match=r"data\.train=.*both/train data\.test=.*both/val"):
        build_labeled_splits(labeled(root=tmp_path / "both"))
    with pytest.raises(UserError, match="a list has no labels"):
        build_labeled_splits(labeled(source="list", root=tmp_path))


@pytest.mark.parametrize(
    "names", [("train", "valid"), ("Train", "Test"), ("training_set", "test_set"), ("trn", "eval")]
)
def test_build_labeled_splits_takes_splits_of_any_usual_name(tmp_path, names):
    train, test = names
    put(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/a/3.png", f"{test}/b/4.png", "docs/readme.txt")
    split = build_labeled_splits(labeled(root=tmp_path))
    assert split.train.classes == split.test.classes == ["a", "b"]
    assert (split.train.root, split.test.root) == (tmp_path / train, tmp_path / test)
    assert build_dataset("folder", tmp_path).classes == []  # splits are not classes of an unlabeled folder either


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "val", "test"),
        ("val", "test"),
        ("train", "training", "val"),
        ("train", "test", "cat"),
        ("train", "extra"),
    ],
)
def test_build_labeled_splits_refuses_unclear_splits_and_names_the_keys(tmp_path, folders):
    put(tmp_path, *(f"{folder}/{name}/1.png" for folder in folders for name in "ab"))
    with pytest.raises(UserError, match=r"not clear.*data\.train=.* data\.test="):
        build_labeled_splits(labeled(root=tmp_path))
    assert build_labeled_splits(labeled(train=tmp_path / folders[0], test=tmp_path / folders[1])).test is not None


def test_build_labeled_splits_keeps_the_labels_of_a_test_set_that_lacks_classes(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "test/c/4.png", "test/b/5.png")
    split = build_labeled_splits(labeled(root=tmp_path))
    assert split.test.classes == ["a", "b", "c"]
    assert split.test.labels.tolist() == [1, 2]


def test_labels_from_folders_are_equal_in_any_unicode_form_and_without_blanks(tmp_path, caplog):
    put(tmp_path, "train/Cafe\u0301/1.png", "train/dog /2.png", "test/Caf\u00e9/3.png", "test/dog/4.png")
    put(tmp_path, "train/__MACOSX/Cafe\u0301/5.png", "train/@eaDir/6.png")
    split = build_labeled_splits(labeled(root=tmp_path))
    assert split.train.classes == split.test.classes == ["Caf\u00e9", "dog"]
    assert len(split.train) == 2
    put(tmp_path, "train/dog/7.png")
    assert build_labeled_splits(labeled(root=tmp_path)).train.labels.tolist() == [0, 1, 1]
    assert "are one class: ['dog ', 'dog']" in caplog.text


def test_scan_image_folder_counts_a_second_path_to_a_folder(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "c").symlink_to(tmp_path / "a", target_is_directory=True)
    assert build_dataset("folder", tmp_path).ignored == {"second path to a folder": 1}


# --- torchvision's data sets -----------------------------------------------------------------------------------


def checksum(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


def make_cifar(root, kind, monkeypatch):
    """The official layout with four images per file; torchvision's checksums are set to theirs."""
    rng, folder = np.random.default_rng(0), root / kind.base_folder
    folder.mkdir()
    key = "labels" if kind is CIFAR10 else "fine_labels"
    for listing in ("train_list", "test_list"):
        for name, _ in getattr(kind, listing):
            entry = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), key: [3, 1, 2, 0]}
            (folder / name).write_bytes(pickle.dumps(entry))
        monkeypatch.setattr(kind, listing, [(name, checksum(folder / name)) for name, _ in getattr(kind, listing)])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: ["ant", "bee", "cat", "dog"]}))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": checksum(meta)})


@pytest.mark.parametrize(("source", "kind", "count"), [("cifar10", CIFAR10, 20), ("cifar100", CIFAR100, 4)])
def test_load_torchvision_dataset_reads_cifar(tmp_path, monkeypatch, source, kind, count):
    make_cifar(tmp_path, kind, monkeypatch)
    dataset = build_dataset(source, tmp_path)
    assert len(dataset) == count
    assert dataset.classes == ["ant", "bee", "cat", "dog"]
    assert dataset.labels[:4].tolist() == [3, 1, 2, 0]
    first = np.asarray(kind(tmp_path)[0][0])
    assert np.array_equal(dataset.read(0, 3).permute(1, 2, 0), first)
    assert np.array_equal(dataset.read(0, 1)[0], Image.fromarray(first).convert("L"))
    assert torch.equal(dataset.all(1)[2], dataset.read(2, 1))
    split = build_labeled_splits(labeled(source=source, root=tmp_path))
    assert (len(split.train), len(split.test)) == (count, 4)
    assert split.test.fingerprint(sizes=True) != split.train.fingerprint(sizes=True)


def test_load_torchvision_dataset_reads_stl10(tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / STL10.base_folder
    folder.mkdir()
    for name, count in {"train_X.bin": 5, "unlabeled_X.bin": 7, "test_X.bin": 4}.items():
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / name)
    np.array([1, 2, 10, 1, 3], np.uint8).tofile(folder / "train_y.bin")
    np.array([1, 2, 3, 4], np.uint8).tofile(folder / "test_y.bin")
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(classes))
    for listing in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, listing, [[name, checksum(folder / name)] for name, _ in getattr(STL10, listing)])
    dataset = build_dataset("stl10", tmp_path)
    assert dataset.labels.tolist() == [0, 1, 9, 0, 2, *[-1] * 7]
    assert dataset.classes == classes
    first = np.asarray(STL10(tmp_path)[0][0])
    assert np.array_equal(dataset.read(0, 3).permute(1, 2, 0), first)
    split = build_labeled_splits(labeled(source="stl10", root=tmp_path))
    assert split.train.labels.tolist() == [0, 1, 9, 0, 2]
    assert split.test.labels.tolist() == [0, 1, 2, 3]


def test_load_torchvision_dataset_names_missing_and_damaged_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cifar-10-batches-py lacks data_batch_1, .*batches\.meta"):
        build_dataset("cifar10", tmp_path)
    with pytest.raises(UserError, match="stl10_binary lacks"):
        build_labeled_splits(labeled(source="stl10", root=tmp_path))
    make_cifar(tmp_path, CIFAR10, monkeypatch)
    (tmp_path / CIFAR10.base_folder / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        build_dataset("cifar10", tmp_path)


def test_rgb_to_gray_equals_pillow():
    rgb = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert np.array_equal(rgb_to_gray(torch.from_numpy(rgb).permute(2, 0, 1))[0], Image.fromarray(rgb).convert("L"))


# --- the list of skipped images ------------------------------------------------------------------------------


def test_skipped_image_log_lists_each_image_once(tmp_path):
    first, second = (SkippedImageLog(tmp_path / "run" / "skipped_images.txt") for _ in range(2))
    assert first.count() == 0
    first.record(UnreadableImageError("a.jpg", "empty"))
    second.record(UnreadableImageError("a.jpg", "empty, again"))
    second.record(UnreadableImageError("b.jpg", "cut"))
    first.record(UnreadableImageError("b.jpg", "cut, again"))
    first.record(UnreadableImageError("c.jpg", "gone"))
    assert (tmp_path / "run" / "skipped_images.txt").read_text() == "a.jpg\tempty\nb.jpg\tcut\nc.jpg\tgone\n"
    assert first.count() == second.count() == 3


def test_skipped_image_log_is_shared_by_processes(tmp_path):
    skipped = SkippedImageLog(tmp_path / "skipped_images.txt")
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=record_many, args=(skipped, shift)) for shift in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = skipped.path.read_text().splitlines()
    assert sorted(lines) == sorted(f"{i}.jpg\tbroken" for i in range(42))
    assert skipped.count() == 42


def record_many(skipped, shift):
    for i in range(40):
        skipped.record(UnreadableImageError(f"{i + shift}.jpg", "broken"))
