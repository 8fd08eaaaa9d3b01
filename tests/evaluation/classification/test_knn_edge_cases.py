"""Every row of the table of kNN's corner cases, by its name.

Rows that tests/test_knn.py has: fewer than 100 test images, labels with gaps and classes missing from the test or
training images (`test_equals_the_textbook_image_by_image`), k above the number of images and above the smallest
class, one folder left one out by index (`test_leave_one_out_finds_exact_copies_but_never_the_image_itself`), ties
(`test_equally_near_neighbors_come_in_the_banks_order`, `test_of_equally_voted_classes_the_lower_is_answered`), halves
(`test_stored_halves_are_compared_in_float32`), votes that do not overflow, blocks that change nothing. Rows that
tests/test_evaluation_commands.py has: near duplicates, k beyond the data, collapsed and diverged models. That several
processes describe each image once is for the tests of features to say.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.data.dataset import SkippedImageLog, Subset
from ssl_vit.data.duplicates import exact_duplicates
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.tar_shards import load_shards
from ssl_vit.data.sources.torchvision_datasets import ArrayDataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification import knn as voting
from ssl_vit.evaluation.classification.knn import LabeledFeatures, classify, knn, search
from ssl_vit.evaluation.classification.nearest_neighbors import exact_search
from ssl_vit.evaluation.features.extractor import extract
from ssl_vit.models.checkpoint import load_backbone
from tests.reference import probes

HALF = [0.5, 0.5, 0.5]


def record_of(model, root, out, *words):
    """The record of a kNN evaluation."""
    command = [
        "knn",
        f"checkpoint={model}",
        f"data.root={root}",
        "data.num_workers=0",
        f"out={out}",
        "baselines=false",
    ]
    assert main([*command, *words]) == 0
    return json.loads(out.read_text())


def shares(record):
    return {metric["name"]: metric["value"] for metric in record["score"]["metrics"]}


def noise(count, classes, seed, *, dim=24):
    """Labeled features without any structure."""
    g = torch.Generator().manual_seed(seed)
    return LabeledFeatures(torch.randn(count, dim, generator=g), torch.randint(classes, (count,), generator=g))


def textbook(bank, queries, k, temperature):
    """The class that comes first, of each query, in float64."""
    return [
        answer[0]
        for answer in probes.knn_classes(
            queries.features.double().numpy(), bank.features.double().numpy(), bank.labels.tolist(), k, temperature
        )
    ]


def write(folder, name, image):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- labels >= 1000, or fewer than five classes ---


def test_labels_above_999_and_any_number_of_classes():
    bank, queries = noise(150, 3, 0), noise(40, 3, 1)
    labels = torch.tensor([1000, 7, 123_456])
    named = [LabeledFeatures(part.features, labels[part.labels]) for part in (bank, queries)]
    result = knn(*named, ks=[7], temperature=0.07)
    assert result.predicted[7].tolist() == textbook(*named, 7, 0.07)
    assert result.ranks[7].max() < 3


@pytest.mark.parametrize(("classes", "said"), [(4, True), (6, False)])
def test_fewer_than_six_classes_have_no_top_5_as_the_table_says(classes, said, tiny_model, sample, tmp_path, capsys):
    for folder in sorted((sample / "train").iterdir())[:classes]:
        shutil.copytree(folder, tmp_path / "set" / folder.name)
    record = record_of(tiny_model, tmp_path / "set", tmp_path / "record.json", "k=[3]")
    assert ("top-5, k=3" in shares(record)) != said
    assert ("top-5 needs six classes" in capsys.readouterr().out) == said


# --- a class that is missing among the test images ---


def test_a_class_whose_test_images_are_all_broken_still_counts(tiny_model, sample, tmp_path):
    shutil.copytree(sample / "train", tmp_path / "set" / "train")
    shutil.copytree(sample / "test", tmp_path / "set" / "test")
    first = min((tmp_path / "set" / "test").iterdir())
    for file in first.iterdir():
        file.write_bytes(b"no image")
    record = record_of(tiny_model, tmp_path / "set", tmp_path / "record.json")
    assert record["data"]["n_classes"] == 12
    assert record["data"]["n_test"] == 44


# --- k above the smallest class ---


def test_where_every_k_exceeds_the_smallest_class_its_size_is_measured_too(tiny_model, sample, tmp_path, capsys):
    record = record_of(tiny_model, sample, tmp_path / "record.json", "k=[20,100]")  # 16 training images a class
    assert list(shares(record))[:3] == ["top-1, k=16", "top-1, k=20", "top-1, k=100"]
    assert record["protocol"]["k"] == [20, 100]
    assert "k = 16 was added, the size of the smallest class" in capsys.readouterr().out
    alone = record_of(tiny_model, sample, tmp_path / "alone.json", "k=[16]")
    assert shares(alone).items() <= shares(record).items()
    assert "was added" not in capsys.readouterr().out


def test_in_one_folder_the_image_itself_is_not_counted_in_its_class(tiny_model, sample, tmp_path, capsys):
    shutil.copytree(sample / "train", tmp_path / "set")
    first, *others = sorted((tmp_path / "set").iterdir())
    for file in sorted(first.iterdir())[1:]:
        file.unlink()
    record = record_of(tiny_model, tmp_path / "set", tmp_path / "record.json", "k=[20]")
    assert list(shares(record))[:2] == ["top-1, k=15", "top-1, k=20"]  # of 16 images a class
    printed = capsys.readouterr().out
    assert "k = 15 was added, the size of the smallest class without the image itself" in printed
    assert "classes of a single image: 1;" in printed
    for other in others:
        for file in sorted(other.iterdir())[1:]:
            file.unlink()
    record = record_of(tiny_model, tmp_path / "set", tmp_path / "singles.json", "k=[20]")
    assert shares(record)["top-1, k=20"] == 0
    assert not any(name.endswith("k=0") for name in shares(record))


# --- duplicates between training and test images ---


def test_files_that_are_the_same_are_counted_and_named(tiny_model, sample, tmp_path, capsys):
    shutil.copytree(sample / "train", tmp_path / "set" / "train")
    shutil.copytree(sample / "test", tmp_path / "set" / "test")
    train, test = tmp_path / "set" / "train" / "blue-dots", tmp_path / "set" / "test" / "red-dots"
    shutil.copy(train / "0002.png", test / "copy.png")
    with Image.open(train / "0003.png") as image:  # the same pixels in another file
        image.save(test / "again.bmp")
    record = record_of(tiny_model, tmp_path / "set", tmp_path / "record.json")
    assert record["data"]["near_duplicates"] == 2
    assert record["data"]["identical_files"] == {
        "count": 1,
        "names": [["red-dots/copy.png", "blue-dots/0002.png"]],
    }
    said = "1 of them byte for byte: red-dots/copy.png = blue-dots/0002.png"
    assert said in capsys.readouterr().out


def test_in_one_folder_a_file_is_no_copy_of_itself(tiny_model, sample, tmp_path):
    shutil.copytree(sample / "test", tmp_path / "set")
    folder = tmp_path / "set" / "red-dots"
    for number in range(10):  # more than the record names
        shutil.copy(folder / "0000.png", folder / f"copy{number}.png")
    record = record_of(tiny_model, tmp_path / "set", tmp_path / "record.json", "k=[5]")
    found = record["data"]["identical_files"]
    assert found["count"] == record["data"]["near_duplicates"] == 11
    assert len(found["names"]) == 8
    assert all(one != other for one, other in found["names"])


def test_only_pairs_with_the_same_content_are_left(tmp_path):
    for name, content in {"a.png": b"one", "b.png": b"two", "c.png": b"one"}.items():
        (tmp_path / name).write_bytes(content)
    dataset = scan_image_folder(tmp_path)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 0]])
    assert exact_duplicates(dataset, dataset, pairs).tolist() == [[0, 2], [2, 0]]
    (tmp_path / "c.png").unlink()
    assert exact_duplicates(dataset, dataset, pairs).tolist() == []
    assert exact_duplicates(dataset, dataset, pairs[:0]).shape == (0, 2)
    turned = Subset(dataset, torch.tensor([1, 0]))
    assert exact_duplicates(turned, dataset, torch.tensor([[1, 0], [0, 0]])).tolist() == [[1, 0]]


def test_images_in_shards_and_arrays_are_compared_too(sample, tmp_path):
    assert main(["shard", f"data.root={sample / 'test'}", f"out={tmp_path / 'shards'}"]) == 0
    files, shards = scan_image_folder(sample / "test"), load_shards(tmp_path / "shards")
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 1], [47, 47]])
    assert exact_duplicates(files, shards, pairs).tolist() == [[0, 0], [1, 1], [47, 47]]

    images = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[2] = images[0]
    array = ArrayDataset(images, torch.zeros(3), ["a"], title="three")
    assert exact_duplicates(array, array, torch.tensor([[0, 1], [0, 2], [1, 2]])).tolist() == [[0, 2]]


# --- ties ---


def test_of_equal_neighbors_the_first_votes_and_of_equal_votes_the_lower_class_wins():
    bank = LabeledFeatures(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([5, 3, 1]))
    query = LabeledFeatures(torch.tensor([[3.0, 0.0]]), torch.tensor([3]))
    result = knn(bank, query, ks=[1, 2], temperature=0.07)
    assert {k: answer.tolist() for k, answer in result.predicted.items()} == {1: [5], 2: [3]}
    assert {k: rank.tolist() for k, rank in result.ranks.items()} == {1: [2], 2: [0]}


# --- halves: exp(cosine / temperature) overflows float16 above a cosine of 0.776 ---


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_halves_of_large_cosines_vote_as_in_float64(temperature):
    bank, queries = noise(300, 7, 0), noise(60, 7, 1)
    bank, queries = (LabeledFeatures((part.features + 4).half(), part.labels) for part in (bank, queries))
    found = search(bank, queries, most=50)
    assert found.similarity.min() > 0.776
    for k in (5, 50):
        result = classify(found, ks=[k], temperature=temperature)
        assert result.predicted[k].tolist() == textbook(bank, queries, k, temperature)


# --- votes of many classes ---


def test_memory_does_not_grow_with_neighbors_times_classes(monkeypatch):
    """A table of neighbors by classes would take 20,000 x 200 entries a query; what is held is classes a query."""
    bank, queries = noise(5000, 20_000, 0), noise(30, 20_000, 1)
    classes = len(torch.cat([bank.labels, queries.labels]).unique())
    monkeypatch.setattr(voting, "_VOTES", 8 * classes)
    sizes = []
    monkeypatch.setattr(voting, "rank_of_true_class", lambda truth, scores: sizes.append(scores.shape) or truth)
    result = knn(bank, queries, ks=[10, 200], temperature=0.07)
    assert set(sizes) == {(8, classes), (6, classes)}
    assert result.predicted[200].tolist() == textbook(bank, queries, 200, 0.07)


# --- gray, RGBA and 16-bit images ---


def as_rgb(gray):
    return Image.fromarray(gray).convert("RGB")


def as_rgba(gray):
    return Image.fromarray(gray).convert("RGBA")


def as_16_bits(gray):
    return Image.fromarray(gray.astype(np.uint16) * 257)


@pytest.mark.parametrize("kind", [Image.fromarray, as_rgba, as_16_bits])
def test_images_of_other_modes_get_the_answers_of_the_same_in_rgb(kind, tiny_model, tmp_path):
    for split, count in {"train": 8, "test": 4}.items():
        for label in range(3):
            for number in range(count):
                gray = pixels([label, number, count], 40, 40)
                gray[0, :2] = 0, 255  # 16 bits are stretched from the least to the largest value
                name = f"{split}/{label}/{number}.png"
                write(tmp_path / "rgb", name, as_rgb(gray))
                write(tmp_path / "other", name, kind(gray) if number % 2 else as_rgb(gray))
    records = [
        record_of(tiny_model, tmp_path / name, tmp_path / f"{name}.json", "k=[1,3]") for name in ("rgb", "other")
    ]
    assert records[0]["score"] == records[1]["score"]
    assert records[1]["data"]["skipped"] == 0
    crossed = tmp_path / "crossed"  # an image of the other mode finds itself in RGB
    shutil.copytree(tmp_path / "rgb" / "train", crossed / "train")
    shutil.copytree(tmp_path / "other" / "train", crossed / "test")
    assert shares(record_of(tiny_model, crossed, tmp_path / "crossed.json", "k=[1]")) == {"top-1, k=1": 1.0}


# --- the bank is made as the queries are; batches do not matter ---


def test_another_batch_size_gives_the_same_features(tiny_model, cifar, tmp_path):
    loaded = load_backbone(str(tiny_model))
    dataset = scan_image_folder(cifar / "test")
    parts = []
    for batch_size in (7, 256):
        skipped = SkippedImageLog(tmp_path / "skipped_images.txt")
        transform = EvalTransform(32, 0.875, HALF, HALF)
        parts.append(
            extract(loaded, dataset, transform, blocks=1, batch_size=batch_size, num_workers=0, skipped=skipped)
        )
    assert torch.equal(parts[0].index, torch.arange(len(dataset)))
    assert torch.equal(parts[0].index, parts[1].index)
    cosine = torch.nn.functional.cosine_similarity(parts[0].cls[:, -1], parts[1].cls[:, -1])
    assert cosine.min() > 0.99999


def test_training_images_are_described_as_test_images_are(tiny_model, cifar, tmp_path):
    """The same folder as both sets: each image is its own nearest, which no augmentation would let it be."""
    words = ["k=[1]", f"data.test={cifar / 'test'}", "data.root=null", f"data.train={cifar / 'test'}"]
    record = record_of(tiny_model, "unused", tmp_path / "record.json", *words)
    assert shares(record)["top-1, k=1"] == 1
    assert record["data"]["near_duplicates"] == record["data"]["n_test"] == 200


# --- all k and temperatures from one search ---


def test_one_search_serves_all_temperatures():
    bank, queries = noise(400, 7, 0), noise(80, 7, 1)
    found = search(bank, queries, most=100)
    for temperature in (0.02, 0.07, 1.0):
        together = classify(found, ks=[5, 20, 100], temperature=temperature)
        for k in (5, 20, 100):
            assert together.predicted[k].tolist() == textbook(bank, queries, k, temperature)


def test_several_temperatures_stand_in_the_names_of_the_metrics(tiny_model, sample, tmp_path, monkeypatch):
    searches = []
    monkeypatch.setattr(
        voting, "exact_search", lambda *words, **more: searches.append(1) or exact_search(*words, **more)
    )
    both = record_of(tiny_model, sample, tmp_path / "both.json", "k=[10,15]", "temperature=[0.1,0.07]")
    assert len(searches) == 1
    names = [f"top-1, k={k}, T={temperature}" for temperature in (0.07, 0.1) for k in (10, 15)]
    assert list(shares(both))[:4] == names
    for temperature in (0.07, 0.1):
        alone = record_of(tiny_model, sample, tmp_path / "one.json", "k=[10,15]", f"temperature=[{temperature}]")
        named = {f"{name}, T={temperature}": value for name, value in shares(alone).items()}
        assert named.items() <= shares(both).items()


# --- real images, against plain float64 ---


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_answers_on_real_images_are_those_of_plain_float64(engine, tiny_model, cifar, tmp_path):
    loaded = load_backbone(str(tiny_model))
    skipped = SkippedImageLog(tmp_path / "skipped_images.txt")
    parts = []
    for name in ("train", "test"):
        dataset = scan_image_folder(cifar / name)
        transform = EvalTransform(32, 0.875, HALF, HALF)
        features = extract(loaded, dataset, transform, blocks=1, batch_size=256, num_workers=0, skipped=skipped)
        parts.append(LabeledFeatures(features.cls[:, -1], features.labels))
    result = knn(*parts, ks=[10, 20, 200], temperature=0.07, engine=engine)
    for k in (10, 20, 200):
        assert result.predicted[k].tolist() == textbook(*parts, k, 0.07)
