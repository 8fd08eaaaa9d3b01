"""The Python API: lazy, typed, the same results as the commands, and datasets of one's own."""

import subprocess
import sys
import time

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

import ssl_vit
from ssl_vit.cli import main
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.runtime.errors import UserError

TINY = ("backbone=vit_cpu", "backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2", "data.num_workers=0")
TINY_DINO = (
    *TINY, "data.batch_size=16", "method.views.local_crops.count=2", "method.views.local_crops.size=24",
    "method.head.prototypes=64", "method.head.hidden_dim=32", "method.head.bottleneck_dim=16",
)  # fmt: skip


class OwnImages(torch.utils.data.Dataset):
    """A user's dataset: the images of a folder as PIL images with labels."""

    def __init__(self, folder):
        self.folder = scan_image_folder(folder)
        self.classes = self.folder.classes

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index):
        return self.folder.read(index, 3), int(self.folder.labels[index])


def test_import_is_quick_and_loads_neither_torch_nor_lightning():
    code = "import sys, ssl_vit; print({'torch', 'lightning', 'timm', 'hydra'} & set(sys.modules)); dir(ssl_vit)"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
    assert time.perf_counter() - start < 5  # .2 s on a free core; this only notices torch


def test_api_has_every_name_documented():
    assert set(ssl_vit.__all__) <= set(dir(ssl_vit))
    for name in ssl_vit.__all__:
        assert getattr(ssl_vit, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ssl_vit.nothing  # noqa: B018


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_methods_train_in_a_plain_lightning_trainer(method, sample, tmp_path):
    words = TINY_DINO if method == "dino" else (*TINY, "data.batch_size=16")
    config = ssl_vit.load_config(f"data.root={sample / 'train'}", f"method={method}", *words)
    data = ssl_vit.ImageDataModule(config.data, config.method.views, seed=config.seed)
    module = {"dino": ssl_vit.DINO, "sit": ssl_vit.SiT}[method]
    model = module(config.method, config.backbone, data.plan(max_epochs=1))
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == len(data.dataset) // 16
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    loaded = ssl_vit.load_backbone(next(tmp_path.rglob("*.ckpt")))
    assert loaded.backbone.embed_dim == 32


def test_pretrain_on_an_own_dataset_equals_its_folder(sample, tmp_path):
    common = (
        *TINY_DINO, "trainer=smoke", "trainer.accelerator=cpu", "trainer.max_steps=2", "online.every_epochs=null",
        "image_logging.every_epochs=null", f"run.folder={tmp_path}",
    )  # fmt: skip
    first = ssl_vit.pretrain(f"data.root={sample / 'train'}", "run.name=folder", *common)
    second = ssl_vit.pretrain("run.name=own", *common, dataset=OwnImages(sample / "train"))
    one, other = (ssl_vit.load_backbone(run).backbone.state_dict() for run in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match=r"already contains a run|holds a run already"):
        ssl_vit.pretrain("run.name=own", *common, dataset=OwnImages(sample / "train"))


@pytest.mark.parametrize("evaluate", [ssl_vit.knn, ssl_vit.linear_probe])
def test_evaluations_of_own_datasets_equal_their_folders(evaluate, tiny_model, sample, tmp_path):
    words = (f"checkpoint={tiny_model}", "data.num_workers=0", "figure=false", "baselines=false")
    words += ("solver=ridge",) if evaluate is ssl_vit.linear_probe else ()
    folder = evaluate(*words, f"data.root={sample}", f"out={tmp_path / 'folder.json'}")
    train, test = OwnImages(sample / "train"), OwnImages(sample / "test")
    own = evaluate(*words, f"out={tmp_path / 'own.json'}", train=train, test=test)
    assert [metric.value for metric in own.score.metrics] == [metric.value for metric in folder.score.metrics]
    assert (tmp_path / "own.json").is_file()
    with pytest.raises(UserError, match="test needs train"):
        evaluate(*words, test=test)


def test_linear_probe_never_ignores_the_datasets_it_is_given(tiny_model, sample):
    with pytest.raises(UserError, match="protocol=dino"):
        ssl_vit.linear_probe(f"checkpoint={tiny_model}", "protocol=dino", train=OwnImages(sample / "train"))


def test_load_backbone_brings_the_transform_of_the_evaluations(tiny_model, sample):
    loaded, path = ssl_vit.load_backbone(tiny_model), next((sample / "test").rglob("*.png"))
    expected = ssl_vit.extract_features(loaded, path).cls[0, 0]
    with Image.open(path) as image:
        for given in (path, str(path), image, np.asarray(image.convert("RGB"))):
            feature = loaded.backbone(loaded.transform(given)[None]).cls[0]
            assert torch.cosine_similarity(feature, expected, dim=0) > 0.9999  # extracted in bfloat16 on some CPUs
    assert loaded.transform(path, image_size=16).shape == (3, 16, 16)
    with pytest.raises(UserError, match="uint8"):
        loaded.transform(torch.rand(3, 32, 32))


def test_extract_features_equals_the_command_and_takes_a_dataset(tiny_model, sample, tmp_path):
    folder = ssl_vit.extract_features(tiny_model, sample / "test")
    own = ssl_vit.extract_features(ssl_vit.load_backbone(tiny_model), OwnImages(sample / "test"))
    assert torch.equal(folder.cls, own.cls)
    assert torch.equal(folder.labels, own.labels)
    words = [f"checkpoint={tiny_model}", f"data.root={sample / 'test'}", "to=npz", f"out={tmp_path / 'f.npz'}"]
    assert main(["features", *words, "data.num_workers=0", f"features={tmp_path / 'cache'}"]) == 0
    with np.load(tmp_path / "f.npz") as stored:
        assert np.allclose(stored["cls"].reshape(len(own.cls), -1, own.cls.shape[-1])[:, -1:], own.cls, atol=2e-3)
    images = torch.stack([OwnImages(sample / "test")[n][0] for n in range(4)])
    assert torch.equal(ssl_vit.extract_features(tiny_model, images).cls, own.cls[:4])
    with pytest.raises(UserError, match="shape"):
        ssl_vit.extract_features(tiny_model, images[0])


def test_attention_maps_sum_to_one_at_each_images_own_size(tiny_model, sample):
    image = next((sample / "test").rglob("*.*"))
    (maps,) = ssl_vit.attention_maps(tiny_model, image)
    assert maps.shape == (3, 6, 6)  # 48 pixels, patches of 8
    assert torch.allclose(maps.sum((1, 2)), torch.ones(3))
