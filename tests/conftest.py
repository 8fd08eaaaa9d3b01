"""What several tests share: real images where there are some, sample images, and the shipped configuration."""

from __future__ import annotations

import os
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.config.pretrain import BackboneConfig, PretrainConfig
from ssl_vit.data.sources.synthetic import make_synthetic_dataset
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.training.callbacks.preemption import PreemptionHandler

CIFAR_PER_CLASS = {"train": 60, "test": 20}

# A model and a schedule that take seconds, on the sample images.
SHRUNK = (
    "backbone=vit_cpu",
    "backbone.embed_dim=32",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "data.batch_size=16",
    "data.num_workers=0",
    "trainer=smoke",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "online.every_epochs=null",
    "image_logging.every_epochs=null",
)
SHRUNK_DINO = (
    "method.views.local_crops.count=2",
    "method.views.local_crops.size=24",
    "method.head.prototypes=64",
    "method.head.hidden_dim=32",
    "method.head.bottleneck_dim=16",
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is remembered in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images, archives or unpacked."""
    if "SSL_VIT_DATA" not in os.environ:
        pytest.skip("needs real images: set SSL_VIT_DATA to their folder")
    return Path(os.environ["SSL_VIT_DATA"])


@pytest.fixture(scope="session")
def ecssd(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/` and `masks/` of ECSSD: 300 images with their objects' masks."""
    return _unpacked(data_folder, "ecssd300", tmp_path_factory)


@pytest.fixture(scope="session")
def photos(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 240 photographs, some of them grayscale."""
    return _unpacked(data_folder, "photos240", tmp_path_factory)


@pytest.fixture(scope="session")
def cifar(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `test/` of CIFAR-10 (JPEG) with class folders: a few images of each class."""
    folder, taken = tmp_path_factory.mktemp("cifar"), Counter()
    for name, read in _cifar_images(data_folder):
        place = Path(name).parent  # <split>/<class>
        taken[place] += 1
        if taken[place] <= CIFAR_PER_CLASS[place.parent.name]:
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(read())
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` (192), `test/` (48) and `test_masks/` of sample images in twelve class folders, 48 pixels each."""
    folder = tmp_path_factory.mktemp("sample")
    make_synthetic_dataset(folder, num_images=240, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported file of a model with random weights, for images of 32 pixels."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "in_chans": 3, "reg_tokens": 0, "embed_dim": 48, "depth": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0, num_heads=3, init="jax", **sizes)
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    export_backbone(Backbone(config).eval(), path, mean=[0.5] * 3, std=[0.5] * 3, source="a test")
    return path


@pytest.fixture
def pretrain_words(sample: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function: the words of a `pretrain` command that takes seconds, then those given to it."""

    def words(*more: str) -> list[str]:
        method = () if "method=sit" in more else SHRUNK_DINO
        return [*SHRUNK, *method, f"data.root={sample / 'train'}", f"run.folder={tmp_path / 'runs'}", *more]

    return words


@pytest.fixture
def pretrain_config(pretrain_words: Callable[..., list[str]]) -> Callable[..., PretrainConfig]:
    """A function: the shipped configuration, shrunk to seconds, with the words given to it."""
    return lambda *more: load_config("pretrain", pretrain_words(*more), PretrainConfig)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A function: within its block, runs are asked to stop, as by Ctrl-C, after so many steps."""
    original = PreemptionHandler.on_train_batch_end

    @contextmanager
    def block(step: int) -> Iterator[None]:
        def ask(self: PreemptionHandler, trainer: L.Trainer, *rest: object) -> None:
            original(self, trainer, *rest)
            if trainer.global_step == step:
                self.received = signal.SIGINT

        with monkeypatch.context() as patch:
            patch.setattr(PreemptionHandler, "on_train_batch_end", ask)
            yield

    return block


def _unpacked(data_folder: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (data_folder / name).is_dir():
        return data_folder / name
    folder = tmp_path_factory.mktemp(name)
    with tarfile.open(data_folder / f"{name}.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def _cifar_images(data_folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The names `<split>/<class>/<number>.jpg`, and how to read them."""
    if (data_folder / "train").is_dir():
        for file in sorted(data_folder.glob("t*/*/*.jpg")):
            yield file.relative_to(data_folder).as_posix(), file.read_bytes
        return
    with tarfile.open(data_folder / "cifar10.tar.xz") as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                yield member.name, archive.extractfile(member).read
