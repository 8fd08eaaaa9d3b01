"""From images to batches: each once per epoch, the same on any number of processes, resumable, none missing."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import PretrainConfig, PretrainDataConfig
from ssl_vit.data.dataset import SkippedImageLog, UnreadableImageError
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.loading import loader as loading
from ssl_vit.data.loading import ram_cache
from ssl_vit.data.loading.batch_sampler import ResumableBatchSampler
from ssl_vit.data.loading.loader import EvalLoader, build_train_loader
from ssl_vit.data.loading.ram_cache import InMemoryLoader, cache_in_memory, place_on_device
from ssl_vit.data.sources import decode as decoding
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.shard_writer import write_shards
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.data.transforms import multicrop as crops
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.runtime import workers as parallel
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.runtime.workers import available_cpus, map_threads, resolve_num_workers


@pytest.fixture(scope="module")
def multicrop():
    sizes = [
        "method.views.global_crops.size=32",
        "method.views.local_crops.size=16",
        "method.views.local_crops.count=3",
    ]
    return MultiCrop(load_config("pretrain", ["data.root=x", "run.name=x", *sizes], PretrainConfig).method.views)


@pytest.fixture
def skipped(tmp_path):
    return SkippedImageLog(tmp_path / "skipped_images.txt")


def put(root, sizes, *, broken=()):
    """Images 000.png, 001.png, ... of these heights and widths; some of them are cut off."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(sizes):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(root / f"{i:03}.png")
        if i in broken:
            (root / f"{i:03}.png").write_bytes((root / f"{i:03}.png").read_bytes()[:60])
    return build_dataset("folder", root)


def load(dataset, multicrop, skipped, *, batch_size=8, num_workers=0, cache_gb=1.0, **course):
    config = PretrainDataConfig(
        source="folder", range="auto", root="x", batch_size=batch_size, num_workers=num_workers, cache_gb=cache_gb
    )
    defaults = {"seed": 0, "channels": 3, "rank": 0, "world": 1, "accumulate": 1, "first_step": 0, "skipped": skipped}
    return build_train_loader(dataset, multicrop, config, **defaults | course)


def epoch(count, batch_size, number=0, **course):
    batches = ResumableBatchSampler(count, batch_size, **{"seed": 0, "rank": 0, "world": 1, "accumulate": 1} | course)
    batches.set_epoch(number)
    return list(batches)


# --- which images --------------------------------------------------------------------------------------------


def test_batch_sampler_yields_each_image_once_per_epoch_in_another_order():
    epochs = [[index for batch in epoch(40, 8, e) for index, _ in batch] for e in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(40))
    assert len(set(map(tuple, epochs))) == 3
    assert epoch(40, 8, 1) == epoch(40, 8, 1)
    assert epoch(40, 8, 1, seed=1) != epoch(40, 8, 1)


def test_batch_sampler_keys_follow_seed_epoch_and_index():
    for batch in epoch(40, 8, 2, seed=5):
        index, key = torch.tensor(batch).unbind(1)
        assert torch.equal(key, sample_keys(5, 2, index))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_sampler_drops_the_remainder(accumulate):
    batches = epoch(45, 8 // accumulate, accumulate=accumulate)
    assert [len(batch) for batch in batches] == [8 // accumulate] * 5 * accumulate
    assert len({index for batch in batches for index, _ in batch}) == 40


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_batch_sampler_gives_any_number_of_processes_the_same_steps(world, accumulate):
    whole = epoch(50, 16, 3)
    parts = [epoch(50, 16 // world // accumulate, 3, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    for step, picks in enumerate(whole):
        micro = range(step * accumulate, (step + 1) * accumulate)
        assert sorted(pick for part in parts for m in micro for pick in part[m]) == sorted(picks)


def test_batch_sampler_repeats_few_images_with_other_keys():
    batches = ResumableBatchSampler(5, 8, seed=0, rank=0, world=1, accumulate=2)
    assert len(batches) == 2
    assert batches.repeats == 4
    picks = [pick for batch in batches for pick in batch]
    assert len(picks) == 16
    assert {index for index, _ in picks} == set(range(5))
    assert len({key for _, key in picks}) == 16


def test_batch_sampler_resumes_within_an_epoch():
    course = {"seed": 0, "rank": 1, "world": 2, "accumulate": 2}
    batches = ResumableBatchSampler(100, 4, **course, first_step=2 * 6 + 4)  # 6 steps of 16 per epoch
    assert len(batches) == 12
    assert list(batches) == epoch(100, 4, 2, **course)[8:]
    batches.set_epoch(2)
    assert list(batches) == epoch(100, 4, 2, **course)[8:]
    batches.set_epoch(3)
    assert list(batches) == epoch(100, 4, 3, **course)


# --- batches of views ------------------------------------------------------------------------------------------


def test_build_train_loader_chooses_the_loader_by_the_images(tmp_path, multicrop, skipped):
    same, mixed = put(tmp_path / "same", [(40, 40)] * 16), put(tmp_path / "mixed", [(40, 40), (50, 30)] * 8)
    assert isinstance(load(same, multicrop, skipped), InMemoryLoader)
    assert load(mixed, multicrop, skipped).dataset.read.__name__ == "read"  # of the images kept in memory
    for dataset in (same, mixed):
        assert load(dataset, multicrop, skipped, cache_gb=0).dataset.read.func == dataset.read
        assert load(dataset, multicrop, skipped, cache_gb=7e-5).dataset.read.func == dataset.read


def test_build_train_loader_gives_the_same_views_from_memory_and_disk(tmp_path, multicrop, skipped):
    dataset = put(tmp_path / "same", [(40, 50)] * 16)
    ways = [
        load(dataset, multicrop, skipped, **way) for way in ({}, {"cache_gb": 0}, {"cache_gb": 0, "num_workers": 2})
    ]
    for resident, disk, num_workers in zip(*ways, strict=True):
        assert resident.global_views.shape == (8, 2, 3, 32, 32)
        assert resident.local_views.shape == (8, 3, 3, 16, 16)
        assert resident.global_views.dtype == disk.local_views.dtype == torch.uint8
        for name in ("label", "index", "key"):
            assert torch.equal(getattr(resident, name), getattr(disk, name))
        for name in ("global_views", "local_views"):
            assert torch.equal(getattr(disk, name), getattr(num_workers, name))
            difference = getattr(resident, name).int() - getattr(disk, name).int()
            assert difference.abs().max() <= 3  # resampling in float and in fixed point


def test_build_train_loader_crops_mixed_sizes_alike_from_memory_and_disk(tmp_path, multicrop, skipped):
    dataset = put(tmp_path / "mixed", [(30 + i, 60 - i) for i in range(16)])
    for memory, disk in zip(
        load(dataset, multicrop, skipped, channels=1),
        load(dataset, multicrop, skipped, channels=1, cache_gb=0),
        strict=True,
    ):
        assert memory.global_views.shape == (8, 2, 1, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(memory, disk, strict=True))


def test_build_train_loader_gives_two_processes_the_views_of_one(tmp_path, multicrop, skipped):
    dataset = put(tmp_path / "same", [(40, 40)] * 16)
    whole = load(dataset, multicrop, skipped)
    parts = [load(dataset, multicrop, skipped, rank=rank, world=2) for rank in range(2)]
    for one, *halves in zip(whole, *parts, strict=True):
        for field, *parts_of_it in zip(one, *halves, strict=True):
            assert torch.equal(field, torch.cat(parts_of_it))


def test_build_train_loader_keeps_labels_with_their_images(tmp_path, multicrop, skipped):
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 8, 8)
    dataset = ArrayDataset(images, torch.arange(20) % 3 - 1, ["a", "b"], title="plain")
    for batch in load(dataset, multicrop, skipped, batch_size=5):
        assert torch.equal(batch.label, batch.index % 3 - 1)
        assert torch.equal(batch.global_views[:, 0, 0, 0, 0].long(), batch.index)


def test_build_train_loader_replaces_unreadable_images_by_the_next(tmp_path, multicrop, skipped):
    sizes, broken = [(40, 40)] * 16, (3, 4, 15)
    dataset = put(tmp_path / "some", sizes, broken=broken)
    expected = {3: 5, 4: 5, 15: 0}
    for way in ({}, {"cache_gb": 0}, {"cache_gb": 0, "num_workers": 2}):
        loader = load(dataset, multicrop, skipped, **way)
        wanted = [torch.tensor(picks)[:, 0] for picks in loader.batch_sampler]
        batches = list(loader)
        for batch, indices in zip(batches, wanted, strict=True):
            assert len(batch.index) == 8
            assert batch.index.tolist() == [expected.get(i, i) for i in indices.tolist()]
        assert {line.split("\t")[0] for line in skipped.path.read_text().splitlines()} == {
            f"{i:03}.png" for i in broken
        }
        assert skipped.count() == 3


@pytest.mark.parametrize("cache_gb", [0, 1.0])
def test_build_train_loader_refuses_a_dataset_without_readable_images(tmp_path, multicrop, skipped, cache_gb):
    dataset = put(tmp_path / "none", [(40, 40)] * 4, broken=range(4))
    with pytest.raises(UserError, match="none of the 4 images can be read"):
        load(dataset, multicrop, skipped, cache_gb=cache_gb)
    assert skipped.count() == 4


def test_build_train_loader_warns_of_few_images(tmp_path, multicrop, skipped, caplog):
    loader = load(put(tmp_path / "few", [(40, 40)] * 3), multicrop, skipped)
    assert "3 images, fewer than one step needs" in caplog.text
    (batch,) = loader
    assert len(batch.index) == 8


class Recorder(L.LightningModule):
    """Trains nothing; remembers the keys it was shown, and saves after a step."""

    def __init__(self, save_at, checkpoint):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys, self.save_at, self.checkpoint = [], save_at, checkpoint

    def training_step(self, batch):
        self.keys += batch.key.tolist()
        return self.weight * batch.global_views.float().mean()

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.checkpoint)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(loader, *, save_at=None, checkpoint=None, resume=False):
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler")
    trainer = L.Trainer(accelerator="cpu", max_steps=9, max_epochs=-1, **dict.fromkeys(off, False))
    recorder = Recorder(save_at, checkpoint)
    trainer.fit(recorder, loader, ckpt_path=checkpoint if resume else None)
    return recorder.keys


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [{}, {"cache_gb": 0, "num_workers": 1}])
@pytest.mark.parametrize("stop", [3, 4])  # at the end of the first epoch of 3 steps, and within the second
def test_batch_sampler_works_in_a_lightning_trainer(tmp_path, multicrop, skipped, way, stop):
    dataset = put(tmp_path / "same", [(40, 40)] * 24)
    expected = [key for number in range(3) for batch in epoch(24, 8, number) for _, key in batch]
    last = tmp_path / "last.ckpt"
    assert fit(load(dataset, multicrop, skipped, **way), save_at=stop, checkpoint=last) == expected
    resumed = fit(load(dataset, multicrop, skipped, first_step=stop, **way), checkpoint=last, resume=True)
    assert resumed == expected[8 * stop :]


# --- large JPEGs -----------------------------------------------------------------------------------------------


@pytest.fixture
def camera(tmp_path, photos):
    """JPEGs far larger than their views; the first cannot be read, the second is no JPEG, one stands on its side."""
    root = tmp_path / "camera"
    root.mkdir()
    for i, file in enumerate(sorted(photos.iterdir())[:12]):
        enlarged = Image.open(file).convert("RGB").resize((480 + 16 * i, 320), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 5 else 1
        enlarged.save(root / f"{i:03}.jpg", quality=92, exif=exif)
        if i == 1:
            enlarged.save(root / f"{i:03}.jpg", "PNG")
    (root / "000.jpg").write_bytes((root / "000.jpg").read_bytes()[:5000])
    return root


def sizes_read(monkeypatch):
    """A list that gets the shape of each image that is decoded from now on."""
    shapes = []
    original = decoding.to_tensor

    def spy(image, channels, value_range):
        pixels = original(image, channels, value_range)
        shapes.append(tuple(pixels.shape))
        return pixels

    monkeypatch.setattr(decoding, "to_tensor", spy)
    return shapes


def test_multicrop_dataset_decodes_large_jpegs_smaller_with_the_same_views(camera, multicrop, skipped, monkeypatch):
    dataset = build_dataset("folder", camera)
    shapes = sizes_read(monkeypatch)
    (smaller,) = load(dataset, multicrop, skipped, batch_size=12, cache_gb=0)
    assert {height for _, height, _ in shapes[1:]} >= {40, 80}
    monkeypatch.setattr(decoding, "JpegImageFile", type(None))
    shapes.clear()
    (whole,) = load(dataset, multicrop, skipped, batch_size=12, cache_gb=0)
    assert min(height for _, height, _ in shapes) == 320
    assert torch.equal(smaller.index, whole.index)
    assert 0 not in smaller.index
    for name in ("global_views", "local_views"):
        difference = (getattr(smaller, name).float() - getattr(whole, name).float()).abs()
        assert difference[smaller.index == 1].max() == 0  # the PNG
        assert 0 < difference.mean() < 4
        assert difference.flatten().quantile(0.999) < 60  # of edges, which lie up to half a pixel elsewhere


def test_build_train_loader_reads_large_jpegs_alike_from_workers_and_shards(camera, multicrop, skipped, tmp_path):
    dataset = build_dataset("folder", camera)
    (here,) = load(dataset, multicrop, skipped, batch_size=12, cache_gb=0)
    (there,) = load(dataset, multicrop, skipped, batch_size=12, cache_gb=0, num_workers=1)
    write_shards(scan_image_folder(camera), tmp_path / "shards", shard_bytes=10**8)
    shards = build_dataset("shards", tmp_path / "shards")
    (sharded,) = load(shards, multicrop, skipped, batch_size=12, cache_gb=0)
    for other in (there, sharded):
        assert all(torch.equal(a, b) for a, b in zip(here, other, strict=True))


# --- on a GPU --------------------------------------------------------------------------------------------------


def test_in_memory_loader_crops_on_the_device(tmp_path, multicrop, skipped, monkeypatch):
    """On a pretended GPU, where reading a value back is an error; labels, indices and keys are the CPU's."""
    dataset = put(tmp_path / "same", [(40, 50)] * 16, broken=(3,))
    here = list(load(dataset, multicrop, skipped))
    mode = FakeTensorMode()

    def sent(values, device):
        assert values.device.type == "cpu" and device.type == "cuda"
        with mode:
            return torch.empty(values.shape, dtype=values.dtype, device=device)

    def together(self, dataset, boxes, *, cache_weights):
        assert not cache_weights  # of tables on the CPU
        with mode:
            return original(self, dataset, boxes, cache_weights=cache_weights)

    original = MultiCrop.crop_batch_matmul
    monkeypatch.setattr(MultiCrop, "crop_batch_matmul", together)
    monkeypatch.setattr(crops, "to_device_async", sent)
    monkeypatch.setattr(ram_cache, "to_device_async", sent)
    monkeypatch.setattr(loading, "place_on_device", sent)
    batches = list(load(dataset, multicrop, skipped, device=torch.device("cuda")))
    for batch, same in zip(batches, here, strict=True):
        for views, there in ((batch.global_views, same.global_views), (batch.local_views, same.local_views)):
            assert views.device.type == "cuda" and views.shape == there.shape and views.dtype == there.dtype
        for name in ("label", "index", "key"):
            assert torch.equal(getattr(batch, name), getattr(same, name))


def test_place_on_device_keeps_too_large_datasets_on_the_cpu(monkeypatch):
    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    assert place_on_device(images, torch.device("cpu")) is images
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * images.nbytes - 1))
    assert place_on_device(images, torch.device("cuda")) is images


# --- whole images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader_keeps_the_order_and_skips_unreadable_images(tmp_path, skipped, num_workers):
    dataset = put(tmp_path / "some", [(30 + i, 40) for i in range(11)], broken=(0, 1, 2, 3, 7))
    transform = EvalTransform(16, 0.875, [0.5] * 3, [0.5] * 3)
    loader = EvalLoader(dataset, transform, batch_size=4, num_workers=num_workers, channels=3, skipped=skipped)
    batches = list(loader)
    assert len(loader) == 3
    assert torch.cat([indices for _, indices in batches]).tolist() == [4, 5, 6, 8, 9, 10]
    for views, indices in batches:
        assert views.dtype == torch.uint8
        for view, index in zip(views, indices.tolist(), strict=True):
            assert torch.equal(view, transform(dataset.read(index, 3)))
    assert skipped.count() == 5


def test_eval_loader_refuses_a_dataset_without_readable_images(tmp_path, skipped):
    dataset = put(tmp_path / "none", [(30, 40)] * 3, broken=range(3))
    transform = EvalTransform(16, 0.875, [0.5] * 3, [0.5] * 3)
    with pytest.raises(UserError, match="none of the images can be read"):
        list(EvalLoader(dataset, transform, batch_size=2, num_workers=0, channels=3, skipped=skipped))


# --- memory and cores ------------------------------------------------------------------------------------------


def test_in_memory_images_equal_the_decoded_files(tmp_path, skipped):
    dataset = put(tmp_path / "mixed", [(30 + i, 60 - i) for i in range(9)], broken=(2,))
    kept = cache_in_memory(dataset, 3, budget=10**6, skipped=skipped, show=False)
    assert kept.readable.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert kept.stacked() is None
    for i in kept.readable.tolist():
        assert torch.equal(kept.read(i), dataset.read(i, 3))
    with pytest.raises(UnreadableImageError, match=r"002\.png"):
        kept.read(2)


def test_cache_in_memory_stops_when_the_estimate_was_too_low(tmp_path, skipped):
    large = {100, 200, 300, 301, 302}
    dataset = put(tmp_path / "many", [(400, 400) if i in large else (2, 2) for i in range(400)])
    assert sum(dataset.read(i, 3).numel() for i in range(400)) > 2_000_000
    assert cache_in_memory(dataset, 3, budget=1_000_000, skipped=skipped, show=False) is None


def test_map_threads_keeps_the_order_and_raises_errors():
    assert list(map_threads(lambda i: i * i, 100, label="", show=False)) == [i * i for i in range(100)]
    assert list(map_threads(lambda i: i, 0, label="", show=False)) == []
    with pytest.raises(ZeroDivisionError):
        list(map_threads(lambda i: 1 // (i - 3), 10, label="", show=False))


def test_resolve_num_workers_follows_the_available_cores(monkeypatch, tmp_path):
    assert available_cpus() >= 1
    monkeypatch.setattr(parallel, "available_cpus", lambda: 8)
    assert resolve_num_workers("auto", processes=1) == 7
    assert resolve_num_workers("auto", processes=4) == 1
    assert resolve_num_workers("auto", processes=8) == 0
    assert resolve_num_workers(3, processes=8) == 3
    monkeypatch.setattr(parallel, "available_cpus", lambda: 200)
    assert resolve_num_workers("auto", processes=1) == parallel.MAX_WORKERS
    for text, cores in {"max 100000": 64, "250000 100000": 3, "50000 100000": 1}.items():
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert parallel._container_cores(tmp_path, 64) == cores
    (tmp_path / "own").write_text("12:cpu:/elsewhere\n0::/job/step\n")
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/cpu.max").write_text("200000 100000\n")
    groups = parallel._control_groups(tmp_path / "own", tmp_path)
    assert groups == [tmp_path / "job/step", tmp_path / "job", tmp_path]
    assert [parallel._container_cores(group, 64) for group in groups] == [64, 2, 1]
    assert parallel._control_groups(tmp_path / "none", tmp_path) == [tmp_path]
    (tmp_path / "cpu.max").unlink()
    assert parallel._container_cores(tmp_path, 64) == 64
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert parallel._container_cores(tmp_path, 64) == 4
