"""Extracted features: values, dtypes, unreadable images, and checks of broken features."""

import dataclasses

import pytest
import torch
from PIL import Image

from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.knn import LabeledFeatures, knn
from ssl_vit.evaluation.features import extractor as module
from ssl_vit.evaluation.features.extractor import (
    BackboneExtractor,
    Features,
    RawPixelExtractor,
    center_cls,
    check_size,
    extract,
    validate_features,
)
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import LoadedBackbone
from ssl_vit.runtime.errors import UserError
from tests.evaluation.classification.test_knn import textbook_ranks

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture
def loaded():
    torch.manual_seed(0)
    config = BackboneConfig(
        name="vit_tiny_patch16_224",
        img_size=48,
        patch_size=16,
        in_chans=3,
        reg_tokens=2,
        drop_path=0.0,
        embed_dim=32,
        depth=3,
        num_heads=2,
        init="jax",
    )
    return LoadedBackbone(Backbone(config).requires_grad_(False).eval(), MEAN, STD, "a model", None, None)


@pytest.fixture
def dataset(sample):
    return scan_image_folder(sample / "test")


@pytest.fixture
def skipped(tmp_path):
    return SkippedImageLog(tmp_path / "skipped_images.txt")


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", lambda device: None)


def transform(size=48):
    return EvalTransform(size, 0.875, MEAN, STD)


def tokens(loaded, blocks, size=48):
    return BackboneExtractor(loaded, transform(size), blocks=blocks)


def healthy(count=20, dim=8):
    g = torch.Generator().manual_seed(0)
    return Features(
        torch.randn(count, 2, dim, generator=g), torch.randn(count, dim), torch.arange(count), torch.arange(count)
    )


def test_extract_returns_the_tokens_of_the_model(loaded, dataset, skipped, in_float32):
    """Blocks in order, the last one last; patch tokens without [CLS] and registers."""
    found = extract(tokens(loaded, 2), dataset, batch_size=7, num_workers=0, skipped=skipped)
    images = torch.stack([dataset.read(index, 3) for index in range(len(dataset))])
    x = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    outputs = loaded.backbone.vit.forward_features(x)  # (N, 1 + 2 + 9, D)
    torch.testing.assert_close(found.cls[:, -1], outputs[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patch_mean, outputs[:, 3:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.cls[:, 0], loaded.backbone.get_intermediate_tokens(x, 2)[0].cls, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(found.labels, dataset.labels)
    assert torch.equal(found.index, torch.arange(len(dataset)))
    assert found.cls.dtype == torch.float32
    assert not found.cls.is_inference()  # a probe can be trained on it


def test_extract_does_not_depend_on_the_chunk_size(loaded, dataset, skipped, in_float32, monkeypatch):
    found = []
    for most in (1, 40, 10**6):  # one image at a time, uneven passes, whole batches
        monkeypatch.setattr(module, "_TOKENS", most)
        found.append(extract(tokens(loaded, 2), dataset, batch_size=7, num_workers=0, skipped=skipped))
    for other in found[1:]:
        torch.testing.assert_close(other.cls, found[0].cls, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.patch_mean, found[0].patch_mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.index, found[0].index)


def test_extract_in_bfloat16_is_close_to_float32(loaded, dataset, skipped, monkeypatch):
    both = []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(module, "autocast_dtype", lambda device, dtype=dtype: dtype)
        both.append(extract(tokens(loaded, 1), dataset, batch_size=16, num_workers=0, skipped=skipped).cls)
    assert torch.nn.functional.cosine_similarity(both[0][:, 0], both[1][:, 0]).min() > 0.999


def test_extract_skips_and_lists_unreadable_images(loaded, sample, skipped, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "some" / label).mkdir(parents=True)
        for number, file in enumerate(sorted((sample / "test").rglob("*.png"))[:3]):
            (tmp_path / "some" / label / f"{number}.png").write_bytes(file.read_bytes())
    (tmp_path / "some" / "a" / "1.png").write_bytes(b"no image")
    dataset = scan_image_folder(tmp_path / "some")
    found = extract(tokens(loaded, 1), dataset, batch_size=2, num_workers=0, skipped=skipped)
    assert found.index.tolist() == [0, 2, 3, 4, 5]
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(found.cls[0], found.cls[2], rtol=1e-3, atol=1e-3)  # the same image in both classes
    assert skipped.path.read_text().startswith("a/1.png\t")


def test_extract_accepts_images_of_any_size_and_mode(loaded, tmp_path, skipped):
    (tmp_path / "odd").mkdir()
    for number, (mode, size) in enumerate([("L", (200, 50)), ("RGBA", (31, 90)), ("P", (48, 48)), ("1", (7, 300))]):
        Image.new(mode, size, 1).save(tmp_path / "odd" / f"{number}.png")
    dataset = scan_image_folder(tmp_path / "odd")
    found = extract(tokens(loaded, 1, 32), dataset, batch_size=4, num_workers=0, skipped=skipped)
    assert found.cls.shape == (4, 1, 32)


def pixels(dataset, transform, **settings):
    return extract(RawPixelExtractor(transform, channels=3), dataset, show=False, **settings)


def test_raw_pixel_extractor_downsamples_to_32(dataset, skipped):
    settings = {"batch_size": 9, "num_workers": 0, "skipped": skipped}
    small = pixels(dataset, transform(32), **settings)
    large = pixels(dataset, transform(48), **settings)
    first = dataset.read(0, 3)
    assert small.cls.shape == large.cls.shape == (48, 1, 3 * 32 * 32)
    torch.testing.assert_close(small.cls[0, 0], transform(32)(first).flatten() / 255)
    reduced = torch.nn.functional.interpolate(first[None] / 255, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(large.cls[0, 0], reduced.flatten())
    assert pixels(dataset, transform(16), **settings).cls.shape == (48, 1, 3 * 16 * 16)
    mean = large.cls.mean(0)
    torch.testing.assert_close(center_cls(large, mean).cls.mean(0), torch.zeros(1, 3072), rtol=0, atol=1e-6)


def test_knn_of_raw_pixels_equals_the_textbook_form(cifar, skipped):
    settings = {"batch_size": 256, "num_workers": 0, "skipped": skipped}
    train, test = (pixels(scan_image_folder(cifar / part), transform(16), **settings) for part in ("train", "test"))
    mean = train.cls.mean(0)
    train_set, queries = (LabeledFeatures(center_cls(part, mean).cls[:, 0], part.labels) for part in (train, test))
    queries = LabeledFeatures(queries.features[::8], queries.labels[::8])
    ranks = knn(train_set, queries, ks=[20], temperature=0.07).ranks[20]
    assert ranks.tolist() == textbook_ranks(train_set, queries, 20)


def test_validate_features_accepts_healthy_features():
    validate_features(healthy(), "a model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cls: cls.index_put_((torch.tensor(3),), torch.tensor(torch.nan)), "1 of 20 images are not finite"),
        (lambda cls: cls.index_put_((torch.tensor(3),), torch.tensor(torch.inf)), "1 of 20 images are not finite"),
        (lambda cls: cls.index_put_((torch.tensor([4, 5]),), torch.tensor(0.0)), "2 of 20 images are zero"),
        (lambda cls: cls.mul_(1e-4).add_(torch.arange(8.0)), "collapsed"),
        (lambda cls: cls.copy_(torch.arange(1.0, 9.0)), "collapsed"),
    ],
)
def test_validate_features_rejects_damaged_features(damage, message):
    features = healthy()
    damaged = dataclasses.replace(features, cls=damage(features.cls.clone()))
    with pytest.raises(UserError, match=message) as caught:
        validate_features(damaged, "runs/x (teacher)")
    assert str(caught.value).startswith("runs/x (teacher): ")


def test_validate_features_rejects_damaged_patch_tokens():
    features = healthy()
    features.patch_mean[2, 1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        validate_features(features, "a model")


def test_check_size_names_the_nearest_multiple_of_the_patch_size():
    check_size(96, 16)
    with pytest.raises(UserError, match=r"data\.image_size=96"):
        check_size(100, 16)
    with pytest.raises(UserError, match=r"data\.image_size=16"):
        check_size(3, 16)
