"""Corner cases of the `knn` command and of kNN classification beyond test_knn.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.data.dataset import SkippedImageLog, Subset, exact_duplicates
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.tar_shards import load_shards
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification import knn as knn_module
from ssl_vit.evaluation.classification.knn import UNRANKED, LabeledFeatures, classify, knn, search
from ssl_vit.evaluation.classification.nearest_neighbors import exact_search
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract
from ssl_vit.models.checkpoint import load_backbone
from tests.reference import probes

HALF = [0.5, 0.5, 0.5]


def run_knn(model, root, out, *overrides):
    """Run `knn` and return its result."""
    command = [
        "knn",
        f"checkpoint={model}",
        f"data.root={root}",
        "data.num_workers=0",
        f"out={out}",
        "baselines=false",
    ]
    assert main([*command, *overrides]) == 0
    return json.loads(out.read_text())


def accuracies(result):
    return {metric["name"]: metric["value"] for metric in result["score"]["metrics"]}


def noise(count, classes, seed, *, dim=24):
    """Return labeled random features."""
    g = torch.Generator().manual_seed(seed)
    return LabeledFeatures(torch.randn(count, dim, generator=g), torch.randint(classes, (count,), generator=g))


def textbook(train, queries, k, temperature):
    """Return the class of each query, in float64."""
    return [
        voted[0]
        for voted in probes.knn_classes(
            queries.features.double().numpy(), train.features.double().numpy(), train.labels.tolist(), k, temperature
        )
    ]


def write(folder, name, image):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- labels >= 1000, or fewer than five classes ---


def test_knn_accepts_any_labels():
    train, queries = noise(150, 3, 0), noise(40, 3, 1)
    labels = torch.tensor([1000, 7, 123_456])
    named = [LabeledFeatures(part.features, labels[part.labels]) for part in (train, queries)]
    result = knn(*named, ks=[7], temperature=0.07)
    assert result.predicted[7].tolist() == textbook(*named, 7, 0.07)
    assert set(result.ranks[7].tolist()) <= {0, 1, 2, UNRANKED}


@pytest.mark.parametrize(("classes", "warned"), [(4, True), (6, False)])
def test_knn_skips_top_5_below_six_classes_and_warns(classes, warned, tiny_model, sample, tmp_path, capsys):
    for folder in sorted((sample / "train").iterdir())[:classes]:
        shutil.copytree(folder, tmp_path / "set" / folder.name)
    result = run_knn(tiny_model, tmp_path / "set", tmp_path / "result.json", "k=[3]")
    assert ("top-5, k=3" in accuracies(result)) != warned
    assert ("top-5 is skipped" in capsys.readouterr().out) == warned


# --- a class that is missing among the test images ---


def test_knn_counts_a_class_without_readable_test_images(tiny_model, sample, tmp_path):
    shutil.copytree(sample / "train", tmp_path / "set" / "train")
    shutil.copytree(sample / "test", tmp_path / "set" / "test")
    first = min((tmp_path / "set" / "test").iterdir())
    for file in first.iterdir():
        file.write_bytes(b"no image")
    result = run_knn(tiny_model, tmp_path / "set", tmp_path / "result.json")
    assert result["data"]["n_classes"] == 12
    assert result["data"]["n_test"] == 44


# --- k above the smallest class ---


def test_knn_adds_the_size_of_the_smallest_class_to_k(tiny_model, sample, tmp_path, capsys):
    result = run_knn(tiny_model, sample, tmp_path / "result.json", "k=[20,100]")  # 16 training images a class
    assert list(accuracies(result))[:3] == ["top-1, k=16", "top-1, k=20", "top-1, k=100"]
    assert result["protocol"]["k"] == [20, 100]
    assert "k = 16 was added, the size of the smallest class" in capsys.readouterr().out
    alone = run_knn(tiny_model, sample, tmp_path / "alone.json", "k=[16]")
    assert accuracies(alone).items() <= accuracies(result).items()
    assert "was added" not in capsys.readouterr().out


def test_knn_with_leave_one_out_excludes_the_image_from_its_class(tiny_model, sample, tmp_path, capsys):
    shutil.copytree(sample / "train", tmp_path / "set")
    first, *others = sorted((tmp_path / "set").iterdir())
    for file in sorted(first.iterdir())[1:]:
        file.unlink()
    result = run_knn(tiny_model, tmp_path / "set", tmp_path / "result.json", "k=[20]")
    assert list(accuracies(result))[:2] == ["top-1, k=15", "top-1, k=20"]  # of 16 images a class
    printed = capsys.readouterr().out
    assert "k = 15 was added, the size of the smallest class without the image itself" in printed
    assert "1 class of a single image" in printed
    for other in others:
        for file in sorted(other.iterdir())[1:]:
            file.unlink()
    result = run_knn(tiny_model, tmp_path / "set", tmp_path / "singles.json", "k=[20]")
    assert accuracies(result)["top-1, k=20"] == 0
    assert not any(name.endswith("k=0") for name in accuracies(result))


# --- duplicates between training and test images ---


def test_knn_counts_and_names_identical_files(tiny_model, sample, tmp_path, capsys):
    shutil.copytree(sample / "train", tmp_path / "set" / "train")
    shutil.copytree(sample / "test", tmp_path / "set" / "test")
    train, test = tmp_path / "set" / "train" / "blue-dots", tmp_path / "set" / "test" / "red-dots"
    shutil.copy(train / "0002.png", test / "copy.png")
    with Image.open(train / "0003.png") as image:  # the same pixels in another file
        image.save(test / "again.bmp")
    result = run_knn(tiny_model, tmp_path / "set", tmp_path / "result.json")
    assert result["data"]["near_duplicates"] == 2
    assert result["data"]["identical_files"] == {
        "count": 1,
        "names": [["red-dots/copy.png", "blue-dots/0002.png"]],
    }
    message = "1 of them byte for byte, for example red-dots/copy.png = blue-dots/0002.png"
    assert message in capsys.readouterr().out


def test_knn_with_leave_one_out_excludes_the_image_from_duplicates(tiny_model, sample, tmp_path):
    shutil.copytree(sample / "test", tmp_path / "set")
    folder = tmp_path / "set" / "red-dots"
    for number in range(10):  # more than the result lists
        shutil.copy(folder / "0000.png", folder / f"copy{number}.png")
    result = run_knn(tiny_model, tmp_path / "set", tmp_path / "result.json", "k=[5]")
    found = result["data"]["identical_files"]
    assert found["count"] == result["data"]["near_duplicates"] == 11
    assert len(found["names"]) == 8
    assert all(one != other for one, other in found["names"])


def test_exact_duplicates_returns_pairs_of_equal_content(tmp_path):
    for name, content in {"a.png": b"one", "b.png": b"two", "c.png": b"one"}.items():
        (tmp_path / name).write_bytes(content)
    dataset = scan_image_folder(tmp_path)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 0]])
    assert exact_duplicates(dataset, dataset, pairs).tolist() == [[0, 2], [2, 0]]
    (tmp_path / "c.png").unlink()
    assert exact_duplicates(dataset, dataset, pairs).tolist() == []
    assert exact_duplicates(dataset, dataset, pairs[:0]).shape == (0, 2)
    reversed_dataset = Subset(dataset, torch.tensor([1, 0]))
    assert exact_duplicates(reversed_dataset, dataset, torch.tensor([[1, 0], [0, 0]])).tolist() == [[1, 0]]


def test_exact_duplicates_compares_shards_and_arrays(sample, tmp_path):
    assert main(["shard", f"data.root={sample / 'test'}", f"out={tmp_path / 'shards'}"]) == 0
    files, shards = scan_image_folder(sample / "test"), load_shards(tmp_path / "shards")
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 1], [47, 47]])
    assert exact_duplicates(files, shards, pairs).tolist() == [[0, 0], [1, 1], [47, 47]]

    images = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[2] = images[0]
    array = ArrayDataset(images, torch.zeros(3), ["a"], title="three")
    assert exact_duplicates(array, array, torch.tensor([[0, 1], [0, 2], [1, 2]])).tolist() == [[0, 2]]


# --- ties ---


def test_knn_breaks_ties_by_index_and_class():
    train = LabeledFeatures(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([5, 3, 1]))
    query = LabeledFeatures(torch.tensor([[3.0, 0.0]]), torch.tensor([3]))
    result = knn(train, query, ks=[1, 2], temperature=0.07)
    assert {k: labels.tolist() for k, labels in result.predicted.items()} == {1: [5], 2: [3]}
    assert {k: rank.tolist() for k, rank in result.ranks.items()} == {1: [UNRANKED], 2: [0]}


# --- half precision: exp(cosine / temperature) overflows float16 above a cosine of 0.776 ---


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_classify_half_precision_equals_float64(temperature):
    train, queries = noise(300, 7, 0), noise(60, 7, 1)
    train, queries = (LabeledFeatures((part.features + 4).half(), part.labels) for part in (train, queries))
    found = search(train, queries, max_k=50)
    assert found.similarity.min() > 0.776
    for k in (5, 50):
        result = classify(found, ks=[k], temperature=temperature)
        assert result.predicted[k].tolist() == textbook(train, queries, k, temperature)


# --- votes of many classes ---


def test_classify_memory_does_not_grow_with_k_times_classes(monkeypatch):
    """A table of neighbors by classes would have 20,000 x 200 entries per query; only classes are held."""
    train, queries = noise(5000, 20_000, 0), noise(30, 20_000, 1)
    classes = len(torch.cat([train.labels, queries.labels]).unique())
    monkeypatch.setattr(knn_module, "_VOTES", 8 * classes)
    sizes = []
    monkeypatch.setattr(knn_module, "rank_of_true_class", lambda target, scores: sizes.append(scores.shape) or target)
    result = knn(train, queries, ks=[10, 200], temperature=0.07)
    assert set(sizes) == {(8, classes), (6, classes)}
    assert result.predicted[200].tolist() == textbook(train, queries, 200, 0.07)


# --- gray, RGBA and 16-bit images ---


def as_rgb(gray):
    return Image.fromarray(gray).convert("RGB")


def as_rgba(gray):
    return Image.fromarray(gray).convert("RGBA")


def as_16_bits(gray):
    return Image.fromarray(gray.astype(np.uint16) * 257)


@pytest.mark.parametrize("kind", [Image.fromarray, as_rgba, as_16_bits])
def test_knn_of_other_image_modes_equals_rgb(kind, tiny_model, tmp_path):
    for split, count in {"train": 8, "test": 4}.items():
        for label in range(3):
            for number in range(count):
                gray = pixels([label, number, count], 40, 40)
                gray[0, :2] = 0, 255  # 16 bits are scaled from the minimum to the maximum
                name = f"{split}/{label}/{number}.png"
                write(tmp_path / "rgb", name, as_rgb(gray))
                write(tmp_path / "other", name, kind(gray) if number % 2 else as_rgb(gray))
    results = [run_knn(tiny_model, tmp_path / name, tmp_path / f"{name}.json", "k=[1,3]") for name in ("rgb", "other")]
    assert results[0]["score"] == results[1]["score"]
    assert results[1]["data"]["skipped"] == 0
    crossed = tmp_path / "crossed"  # an image of the other mode is nearest to itself in RGB
    shutil.copytree(tmp_path / "rgb" / "train", crossed / "train")
    shutil.copytree(tmp_path / "other" / "train", crossed / "test")
    assert accuracies(run_knn(tiny_model, crossed, tmp_path / "crossed.json", "k=[1]")) == {"top-1, k=1": 1.0}


# --- features of train and test images ---


def test_extract_does_not_depend_on_the_batch_size(tiny_model, cifar, tmp_path):
    loaded = load_backbone(str(tiny_model))
    dataset = scan_image_folder(cifar / "test")
    parts = []
    for batch_size in (7, 256):
        skipped = SkippedImageLog(tmp_path / "skipped_images.txt")
        transform = EvalTransform(32, 0.875, HALF, HALF)
        extractor = BackboneExtractor(loaded, transform, blocks=1)
        parts.append(extract(extractor, dataset, batch_size=batch_size, num_workers=0, skipped=skipped))
    assert torch.equal(parts[0].index, torch.arange(len(dataset)))
    assert torch.equal(parts[0].index, parts[1].index)
    cosine = torch.nn.functional.cosine_similarity(parts[0].cls[:, -1], parts[1].cls[:, -1])
    assert cosine.min() > 0.99999


def test_knn_extracts_train_and_test_images_equally(tiny_model, cifar, tmp_path):
    """With a copy as the other set each image is its own nearest, which augmentation would prevent."""
    shutil.copytree(cifar / "test", tmp_path / "copy")
    overrides = ["k=[1]", f"data.test={cifar / 'test'}", "data.root=null", f"data.train={tmp_path / 'copy'}"]
    result = run_knn(tiny_model, "unused", tmp_path / "result.json", *overrides)
    assert accuracies(result)["top-1, k=1"] == 1
    assert result["data"]["near_duplicates"] == result["data"]["n_test"] == 200


# --- all k and temperatures from one search ---


def test_classify_serves_all_temperatures_from_one_search():
    train, queries = noise(400, 7, 0), noise(80, 7, 1)
    found = search(train, queries, max_k=100)
    for temperature in (0.02, 0.07, 1.0):
        together = classify(found, ks=[5, 20, 100], temperature=temperature)
        for k in (5, 20, 100):
            assert together.predicted[k].tolist() == textbook(train, queries, k, temperature)


def test_knn_names_metrics_by_temperature(tiny_model, sample, tmp_path, monkeypatch):
    searches = []
    monkeypatch.setattr(
        knn_module, "exact_search", lambda *args, **kwargs: searches.append(1) or exact_search(*args, **kwargs)
    )
    both = run_knn(tiny_model, sample, tmp_path / "both.json", "k=[10,15]", "temperature=[0.1,0.07]")
    assert len(searches) == 1
    names = [f"top-1, k={k}, T={temperature}" for temperature in (0.07, 0.1) for k in (10, 15)]
    assert list(accuracies(both))[:4] == names
    for temperature in (0.07, 0.1):
        alone = run_knn(tiny_model, sample, tmp_path / "one.json", "k=[10,15]", f"temperature=[{temperature}]")
        named = {f"{name}, T={temperature}": value for name, value in accuracies(alone).items()}
        assert named.items() <= accuracies(both).items()


# --- real images, against plain float64 ---


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_knn_of_real_images_equals_float64(engine, tiny_model, cifar, tmp_path):
    loaded = load_backbone(str(tiny_model))
    skipped = SkippedImageLog(tmp_path / "skipped_images.txt")
    parts = []
    for name in ("train", "test"):
        dataset = scan_image_folder(cifar / name)
        transform = EvalTransform(32, 0.875, HALF, HALF)
        extractor = BackboneExtractor(loaded, transform, blocks=1)
        features = extract(extractor, dataset, batch_size=256, num_workers=0, skipped=skipped)
        parts.append(LabeledFeatures(features.cls[:, -1], features.labels))
    result = knn(*parts, ks=[10, 20, 200], temperature=0.07, engine=engine)
    for k in (10, 20, 200):
        assert result.predicted[k].tolist() == textbook(*parts, k, 0.07)
