"""The sample images are what the demo says of them: learnable objects that trivial features do not tell apart."""

import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.sources.synthetic import CLASSES, make_synthetic_dataset, render


@pytest.fixture(scope="module")
def drawn():
    """1,200 images to search in and 600 to classify: images, object masks, labels of both."""
    rng, labels = np.random.default_rng(0), np.arange(1800) % len(CLASSES)
    dataset, masks = zip(*[render(labels[i : i + 300], rng) for i in range(0, 1800, 300)], strict=True)
    dataset, masks = np.concatenate(dataset) / 255, np.concatenate(masks) > 0
    return (dataset[:1200], masks[:1200], labels[:1200]), (dataset[1200:], masks[1200:], labels[1200:])


def knn_accuracy(bank, bank_labels, queries, labels, k=20):
    """Plain kNN over centerd cosine, votes exp(cosine / 0.07)."""
    middle = bank.mean(axis=0)
    bank, queries = (x - middle for x in (bank, queries))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    cosine = queries @ bank.T
    nearest = np.argsort(-cosine, axis=1)[:, :k]
    votes = np.zeros((len(queries), len(CLASSES)))
    for rank in nearest.T:
        votes[np.arange(len(queries)), bank_labels[rank]] += np.exp(cosine[np.arange(len(queries)), rank] / 0.07)
    return (votes.argmax(axis=1) == labels).mean()


def files(folder):
    """The bytes of every file, by its path in the folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_make_synthetic_dataset_writes_a_fifth_as_test_images_with_masks(tmp_path):
    make_synthetic_dataset(tmp_path, num_images=130, seed=3)
    train, test, masks = (files(tmp_path / kind) for kind in ("train", "test", "test_masks"))
    assert (len(train), len(test)) == (104, 26)
    assert masks.keys() == test.keys()
    assert {path.parts[0] for path in train} == set(CLASSES)
    for path in test:
        image, mask = Image.open(tmp_path / "test" / path), Image.open(tmp_path / "test_masks" / path)
        assert (image.mode, mask.mode) == ("RGB", "L")
        assert image.size == mask.size == (48, 48)
        assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_make_synthetic_dataset_is_a_function_of_the_seed(tmp_path):
    for name, seed in {"a": 0, "b": 0, "other": 1}.items():
        make_synthetic_dataset(tmp_path / name, num_images=60, seed=seed)
    a, b, other = (files(tmp_path / name) for name in ("a", "b", "other"))
    assert a == b
    assert a.keys() == other.keys()
    assert all(a[path] != other[path] for path in a)


def test_render_fills_about_a_third_with_objects(drawn):
    area = drawn[0][1].mean(axis=(1, 2))
    assert 0.30 < area.mean() < 0.35
    assert area.min() > 0.12
    assert area.max() < 0.6


def test_render_makes_classes_hard_for_trivial_features(drawn):
    """Chance is .083; the bands leave out what would make the demo's figures worthless or hopeless."""
    (bank, bank_masks, bank_labels), (queries, masks, labels) = drawn

    def object_color(dataset, masks):
        return np.stack([image[mask].mean(axis=0) for image, mask in zip(dataset, masks, strict=True)])

    raw = knn_accuracy(bank.reshape(1200, -1), bank_labels, queries.reshape(600, -1), labels)
    mean_color = knn_accuracy(bank.mean(axis=(1, 2)), bank_labels, queries.mean(axis=(1, 2)), labels)
    with_mask = knn_accuracy(object_color(bank, bank_masks), bank_labels, object_color(queries, masks), labels)
    assert 0.2 < raw < 0.45
    assert 0.1 < mean_color < 0.33
    assert 0.5 < with_mask < 0.85


def test_render_shows_the_orientation_by_light_from_above(drawn):
    """Ridge regression on 6 x 6 brightnesses finds the quarter turn, which chance finds in .25 of the images."""
    (bank, _, _), (queries, _, _) = drawn

    def small(dataset):
        return dataset.mean(axis=3).reshape(-1, 6, 8, 6, 8).mean(axis=(2, 4))

    def turned(dataset):
        views = np.concatenate([np.rot90(small(dataset), turns, axes=(1, 2)).reshape(-1, 36) for turns in range(4)])
        return np.c_[views, np.ones(len(views))], np.repeat(np.arange(4), len(dataset))

    x, turns = turned(bank)
    weights = np.linalg.solve(x.T @ x + np.eye(37), x.T @ np.eye(4)[turns])
    x, turns = turned(queries)
    assert ((x @ weights).argmax(axis=1) == turns).mean() > 0.6
