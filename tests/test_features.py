"""Features are what the network says of each picture, once, in order; bad ones are refused in words."""

import dataclasses

import pytest
import torch
from PIL import Image
from test_knn import textbook_ranks

from ssl_vit.config import BackboneConfig
from ssl_vit.data.files import folder_pictures
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.evaluation import features as module
from ssl_vit.evaluation.baselines import Pixels, centred
from ssl_vit.evaluation.features import Features, check_health, check_size, extract, in_memory
from ssl_vit.evaluation.knn import Labelled, knn
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.weights import LoadedBackbone
from ssl_vit.transforms.evaluation import EvalTransform

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
    return LoadedBackbone(Backbone(config).requires_grad_(False).eval(), MEAN, STD, "a network", None, None)


@pytest.fixture
def pictures(sample):
    return folder_pictures(sample / "test")


@pytest.fixture
def skipped(tmp_path):
    return SkippedPictures(tmp_path / "skipped.txt")


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", lambda device: None)


def transform(size=48):
    return EvalTransform(size, 0.875, MEAN, STD)


def healthy(count=20, dim=8):
    g = torch.Generator().manual_seed(0)
    return Features(
        torch.randn(count, 2, dim, generator=g), torch.randn(count, dim), torch.arange(count), torch.arange(count)
    )


def test_features_are_the_tokens_of_the_network(loaded, pictures, skipped, in_float32):
    """Blocks in order, the last one last; patch tokens without [CLS] and registers."""
    found = extract(loaded, pictures, transform(), blocks=2, batch_size=7, workers=0, skipped=skipped)
    images = torch.stack([pictures.read(index, 3) for index in range(len(pictures))])
    x = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tokens = loaded.backbone.vit.forward_features(x)  # (N, 1 + 2 + 9, D)
    torch.testing.assert_close(found.cls[:, -1], tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patch_mean, tokens[:, 3:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cls[:, 0], loaded.backbone.last_blocks(x, 2)[0].cls, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, pictures.labels)
    assert torch.equal(found.index, torch.arange(len(pictures)))
    assert found.cls.dtype == torch.float32
    assert not found.cls.is_inference()  # a probe can be trained on it


def test_passes_of_few_pictures_give_the_same_features(loaded, pictures, skipped, in_float32, monkeypatch):
    found = []
    for tokens in (1, 40, 10**6):  # one picture at a time, uneven passes, whole batches
        monkeypatch.setattr(module, "_TOKENS", tokens)
        found.append(extract(loaded, pictures, transform(), blocks=2, batch_size=7, workers=0, skipped=skipped))
    for other in found[1:]:
        torch.testing.assert_close(other.cls, found[0].cls, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.patch_mean, found[0].patch_mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.index, found[0].index)


def test_bfloat16_stays_near_float32(loaded, pictures, skipped, monkeypatch):
    both = []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(module, "autocast_dtype", lambda device, dtype=dtype: dtype)
        both.append(extract(loaded, pictures, transform(), blocks=1, batch_size=16, workers=0, skipped=skipped).cls)
    assert torch.nn.functional.cosine_similarity(both[0][:, 0], both[1][:, 0]).min() > 0.999


def test_broken_pictures_are_missing_and_listed(loaded, sample, skipped, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "some" / label).mkdir(parents=True)
        for number, file in enumerate(sorted((sample / "test").rglob("*.png"))[:3]):
            (tmp_path / "some" / label / f"{number}.png").write_bytes(file.read_bytes())
    (tmp_path / "some" / "a" / "1.png").write_bytes(b"no picture")
    pictures = folder_pictures(tmp_path / "some")
    found = extract(loaded, pictures, transform(), blocks=1, batch_size=2, workers=0, skipped=skipped)
    assert found.index.tolist() == [0, 2, 3, 4, 5]
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(found.cls[0], found.cls[2], rtol=1e-3, atol=1e-3)  # the same picture in both classes
    assert skipped.path.read_text().startswith("a/1.png\t")


def test_pictures_of_any_size_and_mode(loaded, tmp_path, skipped):
    (tmp_path / "odd").mkdir()
    for number, (mode, size) in enumerate([("L", (200, 50)), ("RGBA", (31, 90)), ("P", (48, 48)), ("1", (7, 300))]):
        Image.new(mode, size, 1).save(tmp_path / "odd" / f"{number}.png")
    pictures = folder_pictures(tmp_path / "odd")
    found = extract(loaded, pictures, transform(32), blocks=1, batch_size=4, workers=0, skipped=skipped)
    assert found.cls.shape == (4, 1, 32)


def pixels(pictures, transform, **how):
    return in_memory(Pixels(transform, channels=3), pictures, show=False, **how)


def test_raw_pixels_are_the_picture_reduced_to_32(pictures, skipped):
    how = {"batch_size": 9, "workers": 0, "skipped": skipped}
    small = pixels(pictures, transform(32), **how)
    large = pixels(pictures, transform(48), **how)
    first = pictures.read(0, 3)
    assert small.cls.shape == large.cls.shape == (48, 1, 3 * 32 * 32)
    torch.testing.assert_close(small.cls[0, 0], transform(32)(first).flatten() / 255)
    reduced = torch.nn.functional.interpolate(first[None] / 255, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(large.cls[0, 0], reduced.flatten())
    assert pixels(pictures, transform(16), **how).cls.shape == (48, 1, 3 * 16 * 16)
    mean = large.cls.mean(0)
    torch.testing.assert_close(centred(large, mean).cls.mean(0), torch.zeros(1, 3072), rtol=0, atol=1e-6)


def test_knn_of_real_pixels_equals_the_textbook(cifar, skipped):
    how = {"batch_size": 256, "workers": 0, "skipped": skipped}
    train, test = (pixels(folder_pictures(cifar / part), transform(16), **how) for part in ("train", "test"))
    mean = train.cls.mean(0)
    bank, queries = (Labelled(centred(part, mean).cls[:, 0], part.labels) for part in (train, test))
    queries = Labelled(queries.features[::8], queries.labels[::8])
    ranks = knn(bank, queries, ks=[20], temperature=0.07).ranks[20]
    assert ranks.tolist() == textbook_ranks(bank, queries, 20)


def test_healthy_features_pass():
    check_health(healthy(), "a network")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cls: cls.index_put_((torch.tensor(3),), torch.tensor(torch.nan)), "1 of 20 pictures are not finite"),
        (lambda cls: cls.index_put_((torch.tensor(3),), torch.tensor(torch.inf)), "1 of 20 pictures are not finite"),
        (lambda cls: cls.index_put_((torch.tensor([4, 5]),), torch.tensor(0.0)), "2 of 20 pictures are zero"),
        (lambda cls: cls.mul_(1e-4).add_(torch.arange(8.0)), "collapsed"),
        (lambda cls: cls.copy_(torch.arange(1.0, 9.0)), "collapsed"),
    ],
)
def test_damaged_features_are_refused_in_words(damage, message):
    features = healthy()
    damaged = dataclasses.replace(features, cls=damage(features.cls.clone()))
    with pytest.raises(UserError, match=message) as caught:
        check_health(damaged, "runs/x (teacher)")
    assert str(caught.value).startswith("runs/x (teacher): ")


def test_damaged_patch_tokens_are_refused_too():
    features = healthy()
    features.patch_mean[2, 1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        check_health(features, "a network")


def test_sizes_that_cut_patches_are_refused_with_the_nearest_that_fits():
    check_size(96, 16)
    with pytest.raises(UserError, match=r"data\.image_size=96"):
        check_size(100, 16)
    with pytest.raises(UserError, match=r"data\.image_size=16"):
        check_size(3, 16)
