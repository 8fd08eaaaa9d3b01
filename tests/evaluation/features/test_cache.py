"""The feature cache: content, reuse, damage, interruption, several processes, and the `features` command."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import ImageFolder, scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features import cache_writer
from ssl_vit.evaluation.features.cache import candidate_caches, features_folder
from ssl_vit.evaluation.features.cache_writer import fill_cache
from ssl_vit.evaluation.features.extractor import BackboneExtractor, RawPixelExtractor, extract, validate_features
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from tests.helpers.cli import environment, wait_until

HALF = [0.5, 0.5, 0.5]


def model(seed=0, scale=1.0):
    torch.manual_seed(seed)
    sizes = {"img_size": 48, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 32, "depth": 3}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=2, init="jax", **sizes)
    backbone = Backbone(config).requires_grad_(False).eval()
    backbone.vit.norm.weight.data.mul_(scale)
    return LoadedBackbone(backbone, HALF, HALF, f"model {seed}", None, None)


def tokens(loaded=None, *, blocks=2, crop_ratio=0.875):
    return BackboneExtractor(loaded or model(), EvalTransform(48, crop_ratio, HALF, HALF), blocks=blocks)


def fill(dataset, folder, extractor=None):
    """Return the complete cache, filled in batches of eight."""
    caches = candidate_caches(extractor or tokens(), dataset, folder=folder, name="some-train")
    return fill_cache(caches, batch_size=8, num_workers=0).cache


def arrays(one):
    """Return the content of the files."""
    return {name: (one.folder / name).read_bytes() for name in [*one.arrays, "paths.txt"]}


@pytest.fixture
def folder(sample, tmp_path):
    """48 images in 12 class folders that a test may change."""
    shutil.copytree(sample / "test", tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def dataset(folder):
    return scan_image_folder(folder)


@pytest.fixture
def features(tmp_path):
    return tmp_path / "features"


@pytest.fixture
def reads(monkeypatch):
    """Return the indices of all images read, in order; the function `reads.before` is called before each."""

    class Reads(list):
        before = staticmethod(lambda count: None)

    seen, original = Reads(), ImageFolder.read

    def read(self, index, *rest):
        seen.before(len(seen))
        seen.append(index)
        return original(self, index, *rest)

    monkeypatch.setattr(ImageFolder, "read", read)
    return seen


@pytest.fixture
def flush_at_once(monkeypatch):
    monkeypatch.setattr(cache_writer, "_FLUSH_S", 0.0)


# --- content ---


def test_cache_holds_the_features_of_extract_in_float16(dataset, features, tmp_path):
    extractor = tokens()
    found = fill(dataset, features).features(blocks=2)
    wanted = extract(extractor, dataset, batch_size=8, num_workers=0, skipped=SkippedImageLog(tmp_path / "x.txt"))
    assert found.cls.dtype == found.patch_mean.dtype == torch.float16
    assert torch.equal(found.cls, wanted.cls.half())
    assert torch.equal(found.patch_mean, wanted.patch_mean.half())
    assert torch.equal(found.labels, wanted.labels)
    assert torch.equal(found.index, wanted.index)


def test_cache_files_open_with_numpy(dataset, features):
    cache = fill(dataset, features)
    assert cache.folder.parent == features
    assert cache.folder.name.startswith("some-train-")
    cls = np.load(cache.folder / "cls.npy", mmap_mode="r")
    assert (cls.shape, cls.dtype) == ((48, 2, 32), np.float16)
    assert np.load(cache.folder / "patch_mean.npy").shape == (48, 32)
    assert np.load(cache.folder / "labels.npy").tolist() == dataset.labels.tolist()
    assert np.load(cache.folder / "state.npy").tolist() == [1] * 48
    assert (cache.folder / "paths.txt").read_text().splitlines() == [dataset.name(index) for index in range(48)]
    identity = json.loads((cache.folder / "manifest.json").read_text())["identity"]
    assert identity["images"] == dataset.fingerprint(sizes=True, times=True)
    assert identity["extractor"]["transform"]["crop_ratio"] == 0.875


def test_cache_holds_raw_pixels_to_a_sixteenth_of_a_gray_level(dataset, features):
    extractor = RawPixelExtractor(EvalTransform(32, 0.875, HALF, HALF), channels=3)
    found = fill(dataset, features, extractor).features(blocks=1)
    exact = torch.stack([extractor.transform(dataset.read(index, 3)).flatten() for index in range(48)]) / 255
    assert (found.cls[:, 0].float() - exact).abs().max() <= 1 / 255 / 16
    assert found.patch_mean.shape == (48, 0)


def test_features_folder_prefers_the_given_folder_then_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert features_folder(tmp_path / "own", tmp_path / "run") == tmp_path / "own"
    assert features_folder(None, tmp_path / "run") == tmp_path / "run" / "eval" / "features"
    assert features_folder(None, None) == tmp_path / "ssl-vit" / "features"


def test_features_folder_is_the_users_where_the_run_cannot_be_written_to(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != run)
    assert features_folder(None, run) == tmp_path / "cache" / "ssl-vit" / "features"
    assert "cannot be written to" in caplog.text
    assert features_folder(run / "own", run) == run / "own"


# --- reuse ---


def test_fill_cache_extracts_images_once(dataset, features, reads):
    first = fill(dataset, features)
    before = arrays(first)
    assert reads == list(range(48))
    reads.clear()
    second = fill(dataset, features)
    assert second.folder == first.folder
    assert len(reads) == 16  # evenly spaced, to check that they are unchanged
    assert {reads[0], reads[-1]} == {0, 47}
    assert arrays(second) == before


def test_fill_cache_reuses_a_cache_of_more_blocks(dataset, features, reads):
    more = fill(dataset, features, tokens(blocks=3))
    reads.clear()
    found = fill(dataset, features, tokens(blocks=1))
    assert found.folder == more.folder
    assert len(reads) == 16
    assert torch.equal(found.features(blocks=1).cls, more.features(blocks=3).cls[:, 2:])
    shutil.rmtree(features)
    assert fill(dataset, features, tokens(blocks=1)).folder != fill(dataset, features, tokens(blocks=3)).folder


def test_candidate_caches_depend_on_model_transform_and_images(folder, dataset, features):
    caches = [fill(dataset, features)]
    caches.append(fill(dataset, features, tokens(model(seed=1))))
    caches.append(fill(dataset, features, tokens(crop_ratio=0.5)))
    shutil.copy(next(folder.rglob("*.png")), folder / "red-dots" / "more.png")
    caches.append(fill(scan_image_folder(folder), features))
    (folder / "red-dots" / "more.png").write_bytes(b"of another size")
    caches.append(fill(scan_image_folder(folder), features))
    (folder / "red-dots" / "more.png").write_bytes(b"as another size")
    caches.append(fill(scan_image_folder(folder), features))
    assert len({one.folder for one in caches}) == 6
    assert fill(dataset, features, tokens(model(seed=1))).folder == caches[1].folder


def test_fill_cache_detects_an_image_replaced_with_equal_size_and_time(tmp_path, features, caplog):
    generator = torch.Generator().manual_seed(0)

    def image(number):
        values = torch.randint(256, (48, 48, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(values.numpy()).save(tmp_path / "bitmaps" / f"{number}.bmp")

    (tmp_path / "bitmaps").mkdir()
    for number in range(9):
        image(number)
    dataset = scan_image_folder(tmp_path / "bitmaps")
    before = fill(dataset, features).features(blocks=2).cls.clone()
    assert not caplog.messages
    about = (tmp_path / "bitmaps" / "4.bmp").stat()
    image(4)
    os.utime(tmp_path / "bitmaps" / "4.bmp", ns=(about.st_atime_ns, about.st_mtime_ns))
    after = fill(dataset, features).features(blocks=2).cls
    assert "an image was replaced" in caplog.text
    assert "extracting the features again" in caplog.text
    changed = (after != before).flatten(1).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == [4]


def test_fill_cache_detects_that_the_program_computes_differently(dataset, features, caplog, monkeypatch):
    fill(dataset, features)
    monkeypatch.setattr(EvalTransform, "normalize", lambda self, batch: batch.float() / 100)
    found = fill(dataset, features)
    assert "extracting the features again" in caplog.text
    assert not found.validate()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "cls.npy").write_bytes((folder / "cls.npy").read_bytes()[:-1]),
        lambda folder: (folder / "patch_mean.npy").unlink(),
        lambda folder: (folder / "paths.txt").write_text("x"),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "state.npy").write_bytes((folder / "state.npy").read_bytes()[:-1] + b"\7"),
        lambda folder: (folder / "cls.npy").write_bytes(b"x" + (folder / "cls.npy").read_bytes()[1:]),
    ],
    ids=["cut off", "missing", "text", "manifest", "no manifest", "state", "header"],
)
def test_fill_cache_replaces_damaged_files(damage, dataset, features, caplog):
    cache = fill(dataset, features)
    before = arrays(cache)
    damage(cache.folder)
    assert arrays(fill(dataset, features)) == before
    assert [message for message in caplog.messages if str(cache.folder) in message and "again" in message]


@pytest.mark.parametrize("name", ["cls.npy", "patch_mean.npy", "state.npy", "checksums.npy"])
@pytest.mark.parametrize("row", [1, 20, 46])
@pytest.mark.parametrize("change", [lambda value: value ^ 1, np.zeros_like], ids=["bit", "zeros"])
def test_fill_cache_replaces_a_damaged_row(name, row, change, dataset, features, caplog):
    cache = fill(dataset, features)
    before = arrays(cache)
    rows = np.load(cache.folder / name, mmap_mode="r+")
    values = rows[row : row + 1].view(np.uint8)
    values[:] = change(values) if name != "state.npy" else 2
    rows.flush()
    assert arrays(fill(dataset, features)) == before
    assert [message for message in caplog.messages if str(cache.folder) in message and "again" in message]


def test_fill_cache_replaces_a_cache_without_checksums(dataset, features, caplog):
    cache = fill(dataset, features)
    before = arrays(cache)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    del manifest["bytes"]["checksums.npy"]
    (cache.folder / "manifest.json").write_text(json.dumps(manifest))
    (cache.folder / "checksums.npy").unlink()
    assert arrays(fill(dataset, features)) == before
    assert [message for message in caplog.messages if "without checksums" in message]


def test_validate_features_rejects_infinite_features_from_the_cache(dataset, features, caplog):
    for _ in range(2):
        found = fill(dataset, features, tokens(model(scale=1e6))).features(blocks=1)
        with pytest.raises(UserError, match="65,504"):
            validate_features(found, "a model")
    assert not caplog.messages  # the second time they were taken from the store


# --- unreadable images ---


def test_cache_lists_unreadable_images_again_from_its_files(folder, features, reads):
    for name in ("red-dots/0000.png", "blue-dots/0001.png"):
        (folder / name).write_bytes(b"no image")
    dataset = scan_image_folder(folder)
    broken = [index for index in range(48) if dataset.name(index) in ("red-dots/0000.png", "blue-dots/0001.png")]
    seen = []
    for _ in range(2):
        cache = fill(dataset, features)
        found = cache.features(blocks=1)
        seen.append((list(map(str, cache.broken())), found.index.tolist(), found.cls.shape))
    assert seen[0] == seen[1]
    assert seen[0][1] == [index for index in range(48) if index not in broken]
    assert [line.partition(":")[0] for line in seen[0][0]] == ["blue-dots/0001.png", "red-dots/0000.png"]
    assert np.load(cache.folder / "state.npy")[broken].tolist() == [2, 2]


def test_fill_cache_detects_that_an_image_has_become_readable(folder, features, caplog):
    """Because a disk is back, say, so that its time has not changed."""
    image = folder / "red-dots" / "0000.png"
    good, about = image.read_bytes(), image.stat()
    image.write_bytes(bytes(len(good)))
    os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))
    dataset = scan_image_folder(folder)
    assert len(fill(dataset, features).features(blocks=1).index) == 47
    image.write_bytes(good)
    os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert len(fill(dataset, features).features(blocks=1).index) == 48
    assert "extracting the features again" in caplog.text


def test_cache_without_readable_images_is_an_error(tmp_path, features):
    (tmp_path / "bad").mkdir()
    for number in range(3):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"no image")
    cache = fill(scan_image_folder(tmp_path / "bad"), features)
    with pytest.raises(UserError, match="none of the images can be read"):
        cache.features(blocks=1)
    assert len(cache.skipped.path.read_text().splitlines()) == 3


# --- interruption ---


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_fill_cache_continues_after_an_exception(kind, folder, features, tmp_path, reads, caplog, flush_at_once):
    (folder / "blue-dots" / "0001.png").write_bytes(b"no image")
    dataset = scan_image_folder(folder)
    whole = arrays(fill(dataset, tmp_path / "whole"))

    def stop(count):
        if count == 27:
            raise kind

    reads.clear()
    reads.before = stop
    with pytest.raises(kind):
        fill(dataset, features)
    assert ("24 of 48 images" in caplog.text) == (kind is KeyboardInterrupt)
    reads.clear()
    reads.before = lambda count: None
    assert arrays(fill(dataset, features)) == whole
    assert reads[-24:] == list(range(24, 48))
    assert len(reads) <= 24 + 17  # and those that are extracted again, with the broken one
    assert "extracting the features again" not in caplog.text


def test_fill_cache_continues_after_sigkill(folder, features, tmp_path):
    """SIGKILL, while the 27th image is being read."""
    overrides = [
        f"checkpoint={exported(tmp_path / 'run')}",
        f"data.train={folder}",
        "data.num_workers=0",
        "data.batch_size=8",
    ]
    program = (
        "import threading\n"
        "from ssl_vit import cli\n"
        "from ssl_vit.data.sources.image_folder import ImageFolder\n"
        "from ssl_vit.evaluation.features import cache_writer\n"
        "cache_writer._FLUSH_S, read = 0.0, ImageFolder.read\n"
        "ImageFolder.read = lambda self, i, *rest: threading.Event().wait() if i == 26 else read(self, i, *rest)\n"
        f"cli.main(['features', 'features={features}', *{overrides!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=environment())

    def states():
        return [np.load(file) for file in features.glob("*/state.npy") if (file.parent / "manifest.json").exists()]

    wait_until(lambda: any(state.sum() == 24 for state in states()), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for folder in (features, tmp_path / "whole"):
        assert main(["features", f"features={folder}", *overrides]) == 0
    files = [{file.name: file.read_bytes() for file in folder.glob("*/*")} for folder in (features, tmp_path / "whole")]
    assert files[0] == files[1]
    assert len(files[0]) == 7


def test_cache_writer_marks_rows_done_only_after_sync(dataset, features, monkeypatch, caplog):
    original, full = cache_writer._CacheWriter._sync, True

    def sync(self, name):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name)

    monkeypatch.setattr(cache_writer._CacheWriter, "_sync", sync)
    with pytest.raises(OSError, match="No space left") as caught:
        fill(dataset, features)
    assert str(features) in caught.value.filename
    (state,) = features.glob("*/state.npy")
    assert not np.load(state).any()
    full = False
    assert np.load(fill(dataset, features).folder / "state.npy").all()
    assert not caplog.messages


# --- several processes ---


def threads_as_ranks(monkeypatch, world):
    """Let threads named 0, 1, ... be the ranks of a launch."""
    monkeypatch.setattr(cache_writer, "torchrun_rank", lambda: (int(threading.current_thread().name), world))


@pytest.mark.parametrize("damaged", [False, True])
def test_fill_cache_in_several_processes_equals_one(damaged, dataset, features, tmp_path, monkeypatch):
    one = fill(dataset, tmp_path / "one")
    if damaged:  # the first process makes the folder anew, while the others wait
        (fill(dataset, features).folder / "cls.npy").write_bytes(b"x")
    threads_as_ranks(monkeypatch, 3)
    found, extractor = {}, tokens()  # created here: threads share the random state

    def run():
        caches = candidate_caches(extractor, dataset, folder=features, name="some-train")
        found[threading.current_thread().name] = fill_cache(caches, batch_size=8, num_workers=0)

    threads = [threading.Thread(target=run, name=str(rank)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {rank: one.new for rank, one in found.items()} == {"0": 16, "1": 16, "2": 16}
    for name in ("cls.npy", "patch_mean.npy"):
        several, single = (np.load(each.folder / name).astype(np.float32) for each in (found["0"].cache, one))
        np.testing.assert_allclose(several, single, rtol=0.02, atol=0.02)
    assert np.load(found["0"].cache.folder / "state.npy").tolist() == [1] * 48


def test_fill_cache_reports_a_rank_without_progress(dataset, features, monkeypatch):
    monkeypatch.setattr(cache_writer, "torchrun_rank", lambda: (0, 2))
    monkeypatch.setattr(cache_writer, "_TIMEOUT_S", 0.0)
    with pytest.raises(UserError, match="24 images of another process"):
        fill(dataset, features)


def test_fill_cache_waits_for_another_command(dataset, features, caplog):
    (wanted, *_) = candidate_caches(tokens(), dataset, folder=features, name="some-train")
    features.mkdir()
    found = []
    with caplog.at_level(logging.WARNING), FileLock(features / f".{wanted.folder.name}.lock"):
        thread = threading.Thread(target=lambda: found.append(fill(dataset, features)))
        thread.start()
        wait_until(lambda: "waiting for it to finish" in caplog.text)
        assert not wanted.folder.exists()
    thread.join(60)
    assert np.load(found[0].folder / "state.npy").all()


def test_commands_print_nothing_in_other_ranks(sample, tmp_path, monkeypatch, capsys):
    run = exported(tmp_path / "run")
    overrides = [f"checkpoint={run}", f"data.root={sample}", "data.num_workers=0", f"features={tmp_path / 'features'}"]
    assert main(["knn", *overrides]) == 0
    shutil.rmtree(run / "eval")
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["knn", *overrides]) == 0
    assert main(["features", *overrides]) == 0
    assert capsys.readouterr().out == ""
    assert not (run / "eval").exists()


# --- commands ---


def exported(folder):
    export_backbone(model().backbone, folder / "backbone.safetensors", mean=HALF, std=HALF, source="a test")
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def test_knn_and_linear_share_one_pass(sample, tmp_path, reads):
    shutil.copytree(sample, tmp_path / "mixed")
    for part in ("train", "test"):
        (tmp_path / "mixed" / part / "red-dots" / "0000.png").write_bytes(b"no image")
    run = exported(tmp_path / "run")
    overrides = [f"checkpoint={run}", f"data.root={tmp_path / 'mixed'}", "data.num_workers=0"]
    assert main(["features", *overrides]) == 0
    assert len(reads) == 240
    reads.clear()
    results = []
    for _ in range(2):
        assert main(["knn", *overrides, "baselines=false", "figure=false"]) == 0
        assert len(reads) <= 2 * 17  # 16 of each set, and its broken one
        result = json.loads((run / "eval" / "knn-mixed.json").read_text())
        lists = [(run / "eval" / f"knn-mixed-skipped-{part}.txt").read_text() for part in ("train", "test")]
        results.append([result["score"], result["data"], result["warnings"], lists])
        reads.clear()
    assert main(["linear", *overrides, "baselines=false", "figure=false", "l2=[1e-1,1e-2]"]) == 0
    assert len(reads) <= 2 * 17
    assert results[0] == results[1]
    assert results[0][1]["skipped"] == 2
    assert (run / "eval" / "features").is_dir()


@pytest.fixture
def export_features(sample, tmp_path, capsys):
    """Return a function that runs `features` with overrides and returns what it prints."""

    def command(*overrides, data=None):
        shared = [f"checkpoint={exported(tmp_path / 'run')}", "data.num_workers=0", "blocks=2"]
        assert main(["features", *shared, data or f"data.root={sample}", *overrides]) == 0
        return capsys.readouterr().out

    return command


def test_features_prints_what_is_cached(export_features, sample):
    printed = export_features()
    assert f"train: 192 images in {sample / 'train'}" in printed
    assert "[CLS] of the last 2 blocks" in printed
    assert "effective rank" in printed
    assert "all from the cache" in export_features()


def test_features_npz_equals_the_cache(export_features, sample, tmp_path):
    export_features("to=npz", f"out={tmp_path / 'new' / 'x.npz'}")
    with np.load(tmp_path / "new" / "x.npz") as file:
        exported = dict(file)
    parts = {name: scan_image_folder(sample / name) for name in ("train", "test")}
    assert exported["splits"].tolist() == ["train"] * 192 + ["test"] * 48
    assert exported["paths"].tolist() == [part.name(index) for part in parts.values() for index in range(len(part))]
    assert exported["labels"].tolist() == [*parts["train"].labels.tolist(), *parts["test"].labels.tolist()]
    assert exported["class_names"].tolist() == parts["train"].classes
    for name in ("cls", "patch_mean"):
        cached = [np.load(next((tmp_path / "run").glob(f"eval/features/*-{part}-*/{name}.npy"))) for part in parts]
        np.testing.assert_array_equal(exported[name], np.concatenate(cached))


def test_features_parquet_equals_the_cache(export_features, sample, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("ssl_vit.evaluation.features.feature_export._ROWS", 100)
    export_features("to=parquet", f"out={tmp_path / 'x.parquet'}", "pca=true")
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    train, test = (scan_image_folder(sample / name) for name in ("train", "test"))
    names = [part.name(index) for part in (train, test) for index in range(len(part))]
    assert table["path"] == names
    assert table["class"] == [name.partition("/")[0] for name in names]
    assert [train.classes[label] for label in table["label"]] == table["class"]
    assert table["split"] == ["train"] * 192 + ["test"] * 48
    files = [next((tmp_path / "run").glob(f"eval/features/*-{part}-*/cls.npy")) for part in ("train", "test")]
    embedding = np.concatenate([np.load(file)[:, -1] for file in files]).astype(np.float32)
    np.testing.assert_array_equal(np.array(table["embedding"], dtype=np.float32), embedding)
    centered = embedding - embedding.mean(axis=0)
    plane = np.stack([table["x"], table["y"]], axis=1)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    np.testing.assert_allclose(np.abs(plane), np.abs(left[:, :2] * singular[:2]), rtol=1e-3, atol=1e-3)
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3


def test_features_accepts_unlabeled_images(export_features, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(folder.rglob("*.png"))[:5]):
        shutil.copy(file, flat / f"{number}.png")
    export_features("to=npz", f"out={tmp_path / 'x.npz'}", data=f"data.train={flat}")
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == [-1] * 5
        assert file["paths"].tolist() == [f"{number}.png" for number in range(5)]
        assert file["class_names"].tolist() == []
    parquet = pytest.importorskip("pyarrow.parquet")
    export_features("to=parquet", f"out={tmp_path / 'x.parquet'}", data=f"data.train={flat}")
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["label"] == table["class"] == [None] * 5


def test_features_parquet_without_pyarrow_fails_early(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    run = exported(tmp_path / "run")
    assert main(["features", f"checkpoint={run}", f"data.root={sample}", "to=parquet", f"out={tmp_path / 'x'}"]) == 2
    assert "pip install 'ssl-vit[parquet]'" in capsys.readouterr().err
    assert not (run / "eval").exists()


def test_features_interrupted_reports_how_to_continue(sample, tmp_path, reads, capsys, caplog):
    def stop(count):
        if count == 100:
            raise KeyboardInterrupt

    reads.before = stop
    run = exported(tmp_path / "run")
    overrides = ["features", f"checkpoint={run}", f"data.root={sample}", "data.num_workers=0", "data.batch_size=30"]
    assert main(overrides) == 130
    assert "90 of 192 images" in caplog.text
    assert "run the same command again" in caplog.text
    assert "Traceback" not in capsys.readouterr().err
