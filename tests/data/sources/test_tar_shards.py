"""Shards are a folder in fewer files: the same batches, nothing lost, whatever state the tar files are in."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.evaluate import KNNConfig
from ssl_vit.config.pretrain import PretrainConfig, PretrainDataConfig
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.data.dataset_factory import build_dataset, build_labeled_splits
from ssl_vit.data.loading.loader import build_train_loader
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.shard_index import index_tar
from ssl_vit.data.sources.shard_writer import write_shards
from ssl_vit.data.sources.tar_shards import TarShardDataset, load_shards
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.runtime.errors import UserError


@pytest.fixture(scope="module")
def drawn(sample, tmp_path_factory):
    """192 PNGs in twelve class folders, and the same in shards."""
    shards = tmp_path_factory.mktemp("shards")
    write_shards(scan_image_folder(sample / "train"), shards, shard_bytes=200_000)
    return sample / "train", shards


def jpeg(seed=0, side=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def tar(path, members, *, kind=tarfile.GNU_FORMAT):
    """A tar file of (name or TarInfo, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def samples(count, *, label=None):
    for i in range(count):
        yield f"{i:06}.jpg", jpeg(i)
        if label is not None:
            yield f"{i:06}.cls", str(label(i)).encode()


def names(dataset):
    return [dataset.name(i) for i in range(len(dataset))]


def assert_same_images(dataset, others):
    assert len(dataset) == len(others)
    for i in range(len(dataset)):
        assert torch.equal(dataset.read(i, 3), others.read(i, 3))


# --- the same as a folder --------------------------------------------------------------------------------------


def test_load_shards_has_the_images_and_labels_of_the_folder(drawn):
    folder, shards = map(build_dataset, ("folder", "shards"), drawn)
    assert len(list(drawn[1].glob("*.tar"))) > 2
    assert_same_images(folder, shards)
    assert torch.equal(folder.labels, shards.labels)
    assert folder.classes == shards.classes
    assert shards.name(0) == "shard-000000.tar/000000000.png"
    assert "192 images in " in shards.describe()
    assert "ignored" not in shards.describe()
    assert torch.equal(folder.read(5, 1), shards.read(5, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_load_shards_gives_the_same_batches_as_the_folder(drawn, tmp_path, num_workers):
    assert_same_batches(*drawn, tmp_path, num_workers=num_workers, batch_size=64)


def test_load_shards_gives_the_same_batches_of_photos(photos, tmp_path):
    write_shards(scan_image_folder(photos), tmp_path / "shards", shard_bytes=10**7)
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    assert_same_batches(photos, tmp_path / "shards", tmp_path, num_workers=0, batch_size=80)


def assert_same_batches(folder, shards, tmp_path, *, num_workers, batch_size):
    """From the second step on, in the second of two processes."""
    views = ("method.views.global_crops.size=32", "method.views.local_crops.size=16")
    multicrop = MultiCrop(load_config("pretrain", ["data.root=x", "run.name=x", *views], PretrainConfig).method.views)

    def batches(source, root):
        config = PretrainDataConfig(
            source=source, root=root, range="auto", batch_size=batch_size, num_workers=num_workers, cache_gb=0
        )
        course = {"seed": 3, "channels": 3, "rank": 1, "world": 2, "accumulate": 1, "first_step": 1}
        skipped = SkippedImageLog(tmp_path / "skipped_images.txt")
        return list(build_train_loader(build_dataset(source, root), multicrop, config, **course, skipped=skipped))

    pairs = list(zip(batches("folder", folder), batches("shards", shards), strict=True))
    assert len(pairs) == 2
    for from_folder, from_shards in pairs:
        assert all(torch.equal(a, b) for a, b in zip(from_folder, from_shards, strict=True))


def test_pretrain_from_shards_resumed_equals_pretrain_from_the_folder(pretrain_config, drawn, stop_at):
    words = ("trainer.max_steps=15", "data.cache_gb=0", "online.every_epochs=1")
    shards = ("data.source=shards", f"data.root={drawn[1]}", "run.name=parts")
    whole = pretrain(pretrain_config(*words, f"data.root={drawn[0]}", "run.name=whole"))
    with stop_at(7):  # of 12 in an epoch
        parts = pretrain(pretrain_config(*words, *shards))
    assert state(parts)["global_step"] == 7
    pretrain(pretrain_config(*words, *shards, "run.resume=true"))
    first, second = state(whole), state(parts)
    assert first["global_step"] == second["global_step"] == 15
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


def test_scan_image_folder_of_tar_files_suggests_data_source_shards(drawn):
    with pytest.raises(UserError, match=r"data\.source=shards reads tar files"):
        build_dataset("folder", drawn[1])


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("method", "processes"), [("fork", 2), ("spawn", 1)])
def test_tar_shard_dataset_is_read_by_several_processes(drawn, method, processes):
    dataset = load_shards(drawn[1])
    for i in range(len(dataset)):
        dataset.read(i, 3)  # so that the tar files are open already
    places = range(0, len(dataset), 24)
    with multiprocessing.get_context(method).Pool(processes) as pool:
        read = pool.starmap(TarShardDataset.read, [(dataset, i, 3) for i in places])
        assert all(torch.equal(image, dataset.read(i, 3)) for i, image in zip(places, read, strict=True))


def test_tar_shard_dataset_is_read_by_threads_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_vit.data.sources.tar_shards._MAX_OPEN", 2)
    for n in range(9):
        tar(tmp_path / f"{n}.tar", [(f"{i}.jpg", jpeg(10 * n + i)) for i in range(3)])
    dataset = load_shards(tmp_path)
    expected = [dataset.read(i, 3) for i in range(27)]
    order = np.random.default_rng(0).integers(0, 27, 2000).tolist()
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(8) as threads:
        read = threads.map(lambda i: dataset.read(i, 3), order)
        assert all(torch.equal(image, expected[i]) for i, image in zip(order, read, strict=True))
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before
    assert_same_images(pickle.loads(pickle.dumps(dataset)), dataset)


# --- the layout, and what others write and read ----------------------------------------------------------------


def test_write_shards_is_read_by_webdataset(drawn):
    folder = scan_image_folder(drawn[0])
    paths = sorted(map(str, drawn[1].glob("*.tar")))
    read = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("png", "cls", "json"))
    assert len(read) == len(folder)
    for i, (pixels, label, facts) in enumerate(read):
        assert np.array_equal(pixels, folder.read(i, 3).permute(1, 2, 0).numpy())
        assert label == folder.labels[i]
        assert facts == {"path": folder.name(i)}


def test_load_shards_reads_what_webdataset_writes(tmp_path):
    classes = [3, 7, 7, 3, 11, 3, 7, 11, 3, 3]
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for i, label in enumerate(classes):
            writer.write({"__key__": f"deep/er/{i:04}", "jpg": jpeg(i), "cls": label, "txt": "a caption"})
    dataset = load_shards(tmp_path)
    assert names(dataset)[3:5] == ["000.tar/deep/er/0003.jpg", "001.tar/deep/er/0004.jpg"]
    assert dataset.classes == ["3", "7", "11"]
    assert [int(dataset.classes[label]) for label in dataset.labels] == classes
    assert dataset.ignored == {".txt": 10}
    for i in range(10):
        expected = np.array(Image.open(io.BytesIO(jpeg(i))))
        assert np.array_equal(dataset.read(i, 3).permute(1, 2, 0).numpy(), expected)


def test_load_shards_has_labels_if_every_sample_has_one(tmp_path):
    tar(tmp_path / "a" / "1.tar", samples(4, label=lambda i: i % 2))
    tar(tmp_path / "a" / "2.tar", samples(4, label=lambda i: 5))
    assert load_shards(tmp_path / "a").classes == ["0", "1", "5"]
    for content in ("", "cat", "-1", "1.5", "9" * 30, "7\x00"):
        tar(tmp_path / "a" / "2.tar", samples(4, label=lambda i, content=content: content))
        dataset = load_shards(tmp_path / "a")
        assert dataset.classes == []
        assert dataset.labels.tolist() == [-1] * 8


def test_index_tar_lists_one_regular_file_per_sample(tmp_path):
    def special(kind, name, target=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info, b""

    long = "x" * 300
    members = [
        special(tarfile.DIRTYPE, "photos"),
        ("photos/a.depth.png", jpeg(0)),
        ("photos/a.jpg", jpeg(1)),
        ("photos/a.seg.png", jpeg(2)),
        ("/absolute.JPG", jpeg(3)),
        ("../../above.jpg", jpeg(4)),
        (f"photos/{long}.jpg", jpeg(5)),
        ("new\nline \U0001f431 caf\udce9.jpg", jpeg(6)),
        ("photos/only.two.dots.jpg", jpeg(7)),
        special(tarfile.SYMTYPE, "link.jpg", "/etc/passwd"),
        special(tarfile.LNKTYPE, "hard.jpg", "photos/a.jpg"),
        special(tarfile.CHRTYPE, "device.jpg"),
        special(tarfile.FIFOTYPE, "pipe.jpg"),
        ("._hidden.jpg", b"x"),
        ("readme", b"x"),
        ("index.html", b"x"),
    ]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar(tmp_path / "shards" / "x.tar", members, kind=kind)
        dataset = load_shards(tmp_path / "shards")
        assert [name.removeprefix("x.tar/") for name in names(dataset)] == [
            "photos/a.jpg",
            "/absolute.JPG",
            "../../above.jpg",
            f"photos/{long}.jpg",
            "new\\nline \U0001f431 caf\\xe9.jpg",
            "photos/only.two.dots.jpg",
        ]
        for i, seed in enumerate((1, 3, 4, 5, 6, 7)):
            expected = np.array(Image.open(io.BytesIO(jpeg(seed))))
            assert np.array_equal(dataset.read(i, 3).permute(1, 2, 0).numpy(), expected)
        assert dataset.ignored == {
            "further images of a sample": 2,
            "links, devices and sparse files": 4,
            "hidden": 1,
            "without extension": 1,
            ".html": 1,
        }
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


DOTTED = {  # names of the members, without extension
    "dates": [f"2024.05.{day:02d}_12.00" for day in range(1, 13)],
    "frames": [f"clip{clip}.{frame:04d}" for clip in range(4) for frame in range(3)],
    "augmented": [f"cat{i // 3}_jpg.rf.{i:032x}" for i in range(10)],  # the last has one, others three
    "in a folder": [f"v1.2/v1.{i}.x" for i in range(12)],
}


@pytest.mark.parametrize("extras", [(), ("cls",), ("cls", "json")], ids=str)
@pytest.mark.parametrize("stems", DOTTED.values(), ids=DOTTED.keys())
def test_index_tar_splits_names_with_dots_at_the_last(tmp_path, caplog, stems, extras):
    content = {"jpg": lambda i: jpeg(i), "cls": lambda i: b"%d" % (i % 2), "json": lambda i: b"{}"}
    members = [(f"{stem}.{kind}", content[kind](i)) for i, stem in enumerate(stems) for kind in ("jpg", *extras)]
    tar(tmp_path / "x.tar", members)
    dataset = load_shards(tmp_path)
    assert names(dataset) == [f"x.tar/{stem}.jpg" for stem in stems]
    assert dataset.labels.tolist() == ([i % 2 for i in range(len(stems))] if extras else [-1] * len(stems))
    assert not dataset.ignored and not caplog.text


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        (["0.jpg", "0.cls=3", "1.jpg", "1.cls=4"], [3, 4]),
        (["0.jpg", "0.fine.cls=7", "1.jpg", "1.fine.cls=8"], [7, 8]),
        (["0.jpg", "0.fine.cls=7", "0.coarse.cls=1", "1.jpg", "1.fine.cls=8"], None),  # which of them?
        (["0.jpg", "0.cls=2", "0.coarse.cls=5", "1.jpg", "1.cls=3"], [2, 3]),
        (["p0.a.jpg", "p0.a.cls=0", "p0.b.png", "p0.b.cls=1", "p1.a.jpg", "p1.a.cls=2"], [0, 1, 2]),
        (["0.jpg", "0.cls=1", "0.seg.png", "1.jpg", "1.cls=0", "1.seg.png"], [1, 0]),
    ],
)
def test_index_tar_gives_an_image_the_label_of_its_own_name(tmp_path, members, labels):
    content = [name.partition("=") for name in members]
    tar(tmp_path / "x.tar", [(name, label.encode() if label else jpeg(0)) for name, _, label in content])
    dataset = load_shards(tmp_path)
    given = [int(dataset.classes[label]) for label in dataset.labels] if dataset.classes else None
    assert given == labels


@pytest.mark.parametrize(
    "files",
    [("imagenet-train-000.tar", "imagenet-val-000.tar"), ("train_0.tar", "test_0.tar"), ("d/val.tar", "d/train.tar")],
)
def test_load_shards_refuses_splits_in_one_folder(tmp_path, files):
    for file in files:
        tar(tmp_path / file, samples(2))
    with pytest.raises(UserError, match="look like different splits, which would be mixed"):
        load_shards(tmp_path)


def test_read_shard_index_notices_changed_tar_files_and_flipped_bits(listed, caplog):
    before = load_shards(listed)
    file, first = listed / "shards.safetensors", min(listed.glob("*.tar"))
    content = first.read_bytes()
    assert b"\n" not in content[:512]
    at = content.index(b".cls") + 512 - content.index(b".cls") % 512
    first.write_bytes(content[:at] + b"9" + content[at + 1 :])  # of the same size
    after = load_shards(listed)
    assert "older than a tar file" in caplog.text
    assert after.labels.tolist() != before.labels.tolist()
    first.write_bytes(content)
    os.utime(file)
    assert load_shards(listed).labels.tolist() == before.labels.tolist()
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    arrays = load_file(file)
    arrays["label"] = arrays["label"].copy()
    arrays["label"][0] ^= 1
    save_file(arrays, file, metadata)
    assert load_shards(listed).labels.tolist() == before.labels.tolist()
    assert "another checksum" in caplog.text


def test_load_shards_reports_the_ignored_members_on_the_terminal(tmp_path, caplog):
    views = [(f"{i}.{end}", jpeg(i)) for i in range(5) for end in ("left.jpg", "right.jpg")]
    labels = [(f"{i}.cls", b"1") for i in range(5)]
    tar(tmp_path / "x.tar", [*sorted(views + labels), ("6.jpg", jpeg(6)), ("6.cls", b"0"), ("6.txt", b"")])
    dataset = load_shards(tmp_path)
    assert names(dataset) == [*(f"x.tar/{i}.left.jpg" for i in range(5)), "x.tar/6.jpg"]
    assert dataset.labels.tolist() == [1] * 5 + [0]
    assert "6 members of the tar files ignored: 5 further images of a sample, 1 .txt" in caplog.text


# --- damage ----------------------------------------------------------------------------------------------------


def test_read_names_unreadable_images_and_the_reason(tmp_path):
    tar(tmp_path / "x.tar", [("0.jpg", jpeg()[:200]), ("1.jpg", b""), ("2.jpg", b"no image"), ("3.jpg", jpeg())])
    dataset = load_shards(tmp_path)
    for index, told in enumerate(("Truncated", "an empty file", "first bytes are damaged")):
        with pytest.raises(UnreadableImageError, match=rf"^x\.tar/{index}\.jpg: .*{told}"):
            dataset.read(index, 3)
    assert dataset.read(3, 3).shape == (3, 24, 24)


def test_read_after_a_shard_changed_fails_for_its_images_only(tmp_path):
    path = tar(tmp_path / "x.tar", samples(3))
    dataset = load_shards(tmp_path)
    os.truncate(path, 2000)
    assert dataset.read(0, 3).shape == (3, 24, 24)
    with pytest.raises(UnreadableImageError, match="shorter"):
        dataset.read(2, 3)
    path.unlink()
    with pytest.raises(UnreadableImageError, match=r"x\.tar/000000\.jpg: x\.tar: No such file"):
        pickle.loads(pickle.dumps(dataset)).read(0, 3)


def test_index_tar_of_a_truncated_shard_keeps_the_samples_before(tmp_path, caplog):
    tar(tmp_path / "1.tar", samples(5, label=lambda i: i % 2))
    path = tar(tmp_path / "2.tar", samples(5, label=lambda i: i % 2))
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        fourth, last = file.getmember("000003.jpg"), file.getmember("000004.cls")
    for end, told, kept in (
        (fourth.offset_data + 100, "truncated in 000003.jpg", 3),
        (fourth.offset_data, "truncated in 000003.jpg", 3),
        (fourth.offset_data + fourth.size, "unexpected end of data", 3),
        (fourth.offset + 100, "truncated or damaged at byte", 2),  # who knows what else belonged to the third sample
        (last.offset_data + tarfile.BLOCKSIZE, "truncated or damaged at byte", 4),
    ):
        caplog.clear()
        path.write_bytes(whole[:end])
        dataset = load_shards(tmp_path)
        assert names(dataset) == [f"1.tar/{i:06}.jpg" for i in range(5)] + [f"2.tar/{i:06}.jpg" for i in range(kept)]
        assert dataset.labels.tolist() == [0, 1, 0, 1, 0, *[0, 1, 0, 1][:kept]]
        assert dataset.describe().endswith("damaged shards: 1")
        assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
            "1 of 2 shards damaged; the samples before the damage are used"
        ]
        assert f"2.tar: {told}" in caplog.text
        for i in range(5 + kept):
            dataset.read(i, 3)


def test_index_tar_of_any_damage_lists_fewer_images_at_worst(tmp_path):
    """Bytes of headers changed at random, and the file cut anywhere."""
    path = tar(tmp_path / "x.tar", [*samples(6), ("y" * 300 + ".jpg", jpeg())], kind=tarfile.PAX_FORMAT)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    with tarfile.open(path) as file:
        headers = np.concatenate([np.arange(m.offset, m.offset_data) for m in file.getmembers()])
    rng = np.random.default_rng(0)
    damaged = 0
    for _ in range(300):
        content = whole.copy()
        content[rng.choice(headers, 3)] = rng.choice([0, 0x20, 0x2D, 0x30, 0x37, 0x80, 0xFF, 0x4C, 0x78], 3)
        path.write_bytes(content[: rng.integers(1, 2 * len(content))].tobytes())
        listed = index_tar(path)
        damaged += bool(listed.damage)
        assert len(listed.names) <= 7
        assert ((listed.offset >= 0) & (listed.size >= 0) & (listed.offset + listed.size <= path.stat().st_size)).all()
    assert damaged > 200


def negative_size(content):
    """The first header with a size below zero, in base 256, and a checksum that fits."""
    header = bytearray(content[:512])
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_index_tar_of_a_negative_size_ends(tmp_path, kind):
    info = tarfile.TarInfo("0.jpg")
    info.type = kind
    path = tar(tmp_path / "x.tar", [(info, jpeg()), *samples(2)])
    path.write_bytes(negative_size(path.read_bytes()))
    assert index_tar(path).damage
    assert len(index_tar(path).names) == 0


def test_load_shards_explains_what_is_wrong_with_a_folder(tmp_path):
    def message(root):
        with pytest.raises(UserError) as caught:
            load_shards(root)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "contains no .tar file" in message(tmp_path)
    path = tar(tmp_path / "a" / "x.tar", [])
    assert "is a file" in message(path)
    assert "no image in 1 .tar file of this folder" in message(tmp_path)
    path.write_bytes(b"")
    assert "x.tar: empty file" in message(tmp_path)
    path.write_bytes(b"no tar at all" * 100)
    assert "x.tar: " in message(tmp_path)
    tar(path, [("a.txt", b"x"), ("b.txt", b"x")])
    assert "only 2 .txt" in message(tmp_path)
    tar(path, samples(2))
    assert len(load_shards(tmp_path)) == 2
    with tarfile.open(tmp_path / "y.tar.gz", "w:gz"):
        pass
    assert "y.tar.gz is compressed" in message(tmp_path)
    (tmp_path / "y.tar.gz").rename(tmp_path / "y.tar")
    assert "y.tar is compressed" in message(tmp_path)


# --- the listing that `ssl-vit shard` writes -------------------------------------------------------------------


@pytest.fixture
def listed(sample, tmp_path):
    write_shards(scan_image_folder(sample / "train"), tmp_path, shard_bytes=200_000)
    return tmp_path


def test_read_shard_index_replaces_reading_the_shards(listed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ssl_vit.data.sources.tar_shards.index_tar", None)  # to call it would fail
        kept = load_shards(listed)
    (listed / "shards.safetensors").unlink()
    anew = load_shards(listed)
    assert kept.fingerprint(sizes=True) == anew.fingerprint(sizes=True)
    assert names(kept) == names(anew)
    assert kept.describe() == anew.describe()
    assert_same_images(kept, anew)
    assert torch.equal(kept.labels, anew.labels)
    assert kept.classes == anew.classes


def test_shards_of_version_0_1_load_and_resume(sample, listed, caplog):
    before, tars = load_shards(listed), contents(listed)
    manifest, index = listed / "ssl-vit-shards.json", listed / "shards.safetensors"
    manifest.write_text(manifest.read_text().replace('"num_images"', '"pictures"'))
    arrays = load_file(index)
    arrays["number"] = arrays.pop("label")
    save_file(arrays, index)
    after = load_shards(listed)
    assert not caplog.records
    assert (after.classes, after.fingerprint(sizes=True)) == (before.classes, before.fingerprint(sizes=True))
    write_shards(scan_image_folder(sample / "train"), listed, shard_bytes=200_000)
    assert '"num_images"' in manifest.read_text()
    assert contents(listed) == tars


def test_read_shard_index_ignores_an_index_of_other_shards(listed, caplog):
    last = max(listed.glob("*.tar"))
    before = load_shards(listed)
    count = len(index_tar(last).names)
    last.rename(listed / "another.tar")
    assert len(load_shards(listed)) == len(before)
    assert "does not belong to the tar files" in caplog.text
    (listed / "another.tar").unlink()
    assert len(load_shards(listed)) == len(before) - count
    assert load_shards(listed).fingerprint(sizes=True) != before.fingerprint(sizes=True)


@pytest.mark.parametrize(
    "harm",
    [
        lambda arrays: arrays | {"tar": arrays["tar"] + 1000},
        lambda arrays: arrays | {"offset": arrays["offset"] - 10**6},
        lambda arrays: arrays | {"size": arrays["size"] * 1000},
        lambda arrays: arrays | {"size": arrays["size"][1:]},
        lambda arrays: arrays | {"offset": arrays["offset"].astype(np.float64)},
        lambda arrays: arrays | {"names.ends": arrays["names.ends"][::-1].copy()},
        lambda arrays: arrays | {"names.ends": np.zeros(0, dtype=np.int64)},
        lambda arrays: {name: array for name, array in arrays.items() if name != "label"},
        None,
    ],
)
def test_read_shard_index_ignores_a_damaged_index(listed, caplog, harm):
    before = load_shards(listed)
    file = listed / "shards.safetensors"
    if harm:
        save_file(harm(load_file(file)), file)
    else:
        file.write_bytes(file.read_bytes()[:1000])
    after = load_shards(listed)
    assert "is damaged" in caplog.text
    assert after.fingerprint(sizes=True) == before.fingerprint(sizes=True)


# --- writing ---------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_shard_command_reports_what_it_wrote(sample, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["shard", f"data.root={sample / 'train'}", f"out={out}", "shard_mb=0.3"]) == 0
    shown = capsys.readouterr().out
    tars = sorted(out.glob("*.tar"))
    assert f"192 images in {len(tars)} shards in {out}" in shown
    assert all(path.stat().st_size <= 300_000 for path in tars)
    assert f"ssl-vit pretrain data.source=shards data.root={out}" in shown
    with tarfile.open(tars[0]) as file:
        members = file.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name for m in members[:3]] == ["000000000.png", "000000000.cls", "000000000.json"]


def test_write_shards_gives_the_same_bytes_after_an_interruption(sample, drawn, tmp_path, monkeypatch):
    dataset = scan_image_folder(sample / "train")
    from ssl_vit.data.sources import shard_writer as sharding

    def interrupted(path, *rest, **options):
        if path.name == "shard-000002.tar":
            raise KeyboardInterrupt
        original(path, *rest, **options)

    original = sharding._write_shard
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharding, "_write_shard", interrupted)
        write_shards(dataset, tmp_path, shard_bytes=200_000)
    assert len(contents(tmp_path)) == 2
    assert not (tmp_path / "shards.safetensors").exists()
    os.truncate(tmp_path / "shard-000001.tar", 5000)  # is made anew
    kept = (tmp_path / "shard-000000.tar").stat()
    write_shards(dataset, tmp_path, shard_bytes=200_000)
    assert contents(tmp_path) == contents(drawn[1])
    assert (tmp_path / "shard-000000.tar").stat() == kept
    assert (tmp_path / "shards.safetensors").read_bytes() == (drawn[1] / "shards.safetensors").read_bytes()


def test_write_shards_refuses_a_folder_of_other_shards(sample, tmp_path, capsys):
    def shard(*words):
        return main(["shard", f"data.root={sample / 'train'}", "shard_mb=0.2", *words]), capsys.readouterr().err

    foreign = tar(tmp_path / "foreign" / "x.tar", samples(1)).parent
    code, error = shard(f"out={foreign}")
    assert code == 2
    assert "did not write" in error
    assert len(list(foreign.iterdir())) == 1
    out = tmp_path / "out"
    assert shard(f"out={out}")[0] == 0
    before = contents(out)
    for words in (["shard_mb=0.1"], [f"data.root={sample / 'test'}"]):
        code, error = shard(f"out={out}", *words)
        assert code == 2
        assert "of other images, or of another size" in error
        assert contents(out) == before
    with FileLock(out / ".lock"):
        code, error = shard(f"out={out}")
    assert code == 2
    assert "another ssl-vit shard is writing" in error
    (out / "ssl-vit-shards.json").write_text("[]")
    code, error = shard(f"out={out}")
    assert code == 2
    assert "ssl-vit-shards.json" in error
    code, error = shard(f"out={foreign / 'x.tar'}")
    assert code == 2
    assert "x.tar" in error


def test_write_shards_skips_unreadable_files_and_keeps_any_name(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    odd = ["new\nline.jpg", "\U0001f431.JPEG", os.fsdecode(b"caf\xe9.jpg"), " space .jpg", "really a jpeg.png"]
    for i, name in enumerate(odd):
        (root / name).write_bytes(jpeg(i))
    (root / "empty.jpg").touch()
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "text.jpg").write_text("no image")
    dataset = scan_image_folder(root)
    shards = write_shards(dataset, tmp_path / "out", shard_bytes=10**6)
    assert (shards.num_images, shards.tars) == (5, 1)
    skipped = dict(line.split("\t") for line in (tmp_path / "out" / "skipped_images.txt").read_text().splitlines())
    assert skipped.keys() == {"empty.jpg", "gone.jpg", "text.jpg"}
    assert skipped["empty.jpg"] == "an empty file"
    assert skipped["gone.jpg"] == "No such file or directory"
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as file:
        paths = [json.loads(file.extractfile(m).read())["path"] for m in file if m.name.endswith(".json")]
        members = [m.name for m in file.getmembers() if not m.name.endswith(".json")]
    assert sorted(paths) == sorted([r"new\nline.jpg", "\U0001f431.JPEG", r"caf\xe9.jpg", " space .jpg", odd[-1]])
    places = [i for i in range(8) if dataset.name(i) not in skipped]
    assert members == [f"{i:09}.jpg" for i in places]
    found = load_shards(tmp_path / "out")
    assert all(torch.equal(found.read(n, 3), dataset.read(i, 3)) for n, i in enumerate(places))


def test_write_shards_skips_paths_of_a_list_that_are_no_files(tmp_path):
    for name in ("good.jpg", "better.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "list.txt").write_bytes(b"pipe.jpg\nnul\0.jpg\ngood.jpg\nfolder.jpg\nbetter.jpg\n")
    dataset = build_dataset("list", tmp_path / "list.txt")
    assert write_shards(dataset, tmp_path / "out", shard_bytes=10**6).num_images == 2
    found = load_shards(tmp_path / "out")
    assert names(found) == ["shard-000000.tar/000000002.jpg", "shard-000000.tar/000000004.jpg"]
    assert found.classes == []
    lines = (tmp_path / "out" / "skipped_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == ["folder.jpg", r"nul\x00.jpg", "pipe.jpg"]


def test_write_shards_refuses_images_that_are_all_unreadable(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"none of the 1 images can be read; .*skipped_images\.txt lists the reasons"):
        write_shards(scan_image_folder(tmp_path / "photos"), tmp_path / "out", shard_bytes=10**6)
    assert not (tmp_path / "out" / "shards.safetensors").exists()


def test_write_shards_resumes_after_a_full_disk(sample, drawn, tmp_path, capsys):
    words = ["shard", f"data.root={sample / 'train'}", f"out={tmp_path / 'out'}", "shard_mb=0.2"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))  # no file may become larger
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: File too large" in error
    assert "the same command resumes" in error
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert main(words) == 0
    assert contents(tmp_path / "out") == contents(drawn[1])


# --- evaluation ------------------------------------------------------------------------------------------------


def test_build_labeled_splits_reads_shards_in_train_and_test(sample, tmp_path):
    for part in ("train", "test"):
        write_shards(scan_image_folder(sample / part), tmp_path / part, shard_bytes=10**6)
    words = ["checkpoint=x", "data.source=shards", f"data.root={tmp_path}"]
    split = build_labeled_splits(load_config("knn", words, KNNConfig).data)
    assert split.train.classes == split.test.classes == scan_image_folder(sample / "train").classes
    assert (len(split.train), len(split.test)) == (192, 48)
    tar(tmp_path / "test" / "unlabeled.tar", samples(1))
    with pytest.raises(UserError, match="not every image has one"):
        build_labeled_splits(load_config("knn", words, KNNConfig).data)
