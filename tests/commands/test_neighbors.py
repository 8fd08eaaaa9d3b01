"""`ssl-vit neighbors`: exact and indexed search, figure, JSON, and errors."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.ann_index import IVFIndex
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.visualization.image_rows import NEIGHBOR_SIDE
from tests.reference import probes


@pytest.fixture
def flat(sample, tmp_path):
    """Return a folder with 48 unlabeled images."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for file in (sample / "test").glob("*/*.png"):
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return folder


@pytest.fixture
def overrides(tiny_model, tmp_path):
    return [
        f"checkpoint={tiny_model}",
        "data.num_workers=0",
        f"out={tmp_path / 'figure.png'}",
        f"features={tmp_path / 'features'}",
    ]


def run_neighbors(overrides, *more):
    """Run the command and return its JSON."""
    assert main(["neighbors", *overrides, *more]) == 0
    out = [override.removeprefix("out=") for override in (*overrides, *more) if override.startswith("out=")]
    return json.loads(Path(out[-1]).with_suffix(".json").read_text(encoding="utf-8"))


def names(query):
    return [neighbor["name"] for neighbor in query["neighbors"]]


def test_neighbors_of_an_unlabeled_image(overrides, flat, tmp_path, capsys):
    query = sorted(flat.iterdir())[7]
    content = run_neighbors(overrides, f"data.root={flat}", f"images={query}", "k=5")
    (row,) = content["queries"]
    assert (row["name"], row["class"]) == (query.name, None)
    assert names(row)[0] == query.name  # it is in the dataset
    cosines = [neighbor["cosine"] for neighbor in row["neighbors"]]
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines == sorted(cosines, reverse=True)
    assert all(neighbor["class"] is None for neighbor in row["neighbors"])
    assert content["search"] == {"index": "exact", "k": 5}
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.format == "PNG"
        assert figure.width > 6 * NEIGHBOR_SIDE
    printed = capsys.readouterr().out
    assert str(tmp_path / "figure.json") in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".ssl-vit-outputs",
        "features",
        "figure.json",
        "figure.png",
        "flat",
    ]


def test_neighbors_exclude_the_query_itself(overrides, sample, tiny_model, tmp_path):
    content = run_neighbors(overrides, f"data.root={sample}", "k=6", "limit=9")
    dataset = scan_image_folder(sample / "train")  # with train and test images, the train images are searched
    loaded = load_backbone(str(tiny_model))
    extractor = BackboneExtractor(loaded, EvalTransform(32, 0.875, loaded.mean, loaded.std), blocks=1)
    skipped = SkippedImageLog(tmp_path / "none.txt")
    features = extract(extractor, dataset, batch_size=64, num_workers=0, skipped=skipped)
    every = features.cls[:, -1].double().numpy()
    expected = probes.nearest(every, every, 6, leave_one_out=True)
    index_of = {dataset.name(index): index for index in range(len(dataset))}
    assert len(content["queries"]) == 9
    for row in content["queries"]:
        assert [index_of[name] for name in names(row)] == expected[index_of[row["name"]]]
        assert row["class"] == row["name"].partition("/")[0]
    assert run_neighbors(overrides, f"data.root={sample}", "k=6", "limit=9")["queries"] == content["queries"]
    other = run_neighbors(overrides, f"data.root={sample}", "k=6", "limit=9", "seed=1")["queries"]
    assert [row["name"] for row in other] != [row["name"] for row in content["queries"]]


def test_neighbors_with_an_index_equal_exact_ones_and_reuse_it(overrides, sample, flat, tmp_path, monkeypatch, capsys):
    data = [f"data.root={sample}", f"images={flat}", "k=4", "limit=10", "recall=1.0"]
    exact = run_neighbors(overrides, *data)
    first = run_neighbors(overrides, *data, "index=ivf")
    assert [names(row) for row in first["queries"]] == [names(row) for row in exact["queries"]]
    assert first["search"]["recall"] == 1
    assert first["search"]["measured_on"] == "images of the index, leave-one-out"
    assert "100.0% of the true neighbors found" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(IVFIndex, "build", lambda *_, **__: pytest.fail("it was built again"))
        assert run_neighbors(overrides, *data, "index=ivf")["queries"] == first["queries"]
    (index,) = (tmp_path / "features").glob("*/*.ivf")
    index.write_bytes(b"damaged")
    assert run_neighbors(overrides, *data, "index=ivf")["queries"] == first["queries"]
    assert "is not an index" in capsys.readouterr().out
    content = run_neighbors(overrides, f"data.root={flat}", *data[1:], "index=ivf")  # other images
    assert content["search"]["queries"] == 24  # of 48 in all


def test_neighbors_skip_and_list_unreadable_images(overrides, flat, sample, tmp_path, capsys):
    (flat / "broken.png").write_bytes(b"no image")
    queries = tmp_path / "queries"
    shutil.copytree(sample / "test" / "red-dots", queries)
    (queries / "0000.png").write_bytes(b"no image")
    content = run_neighbors(overrides, f"data.root={flat}", f"images={queries}")
    assert content["skipped"] == {"images": 1, "queries": 1}
    assert "0000.png" not in [row["name"] for row in content["queries"]]
    assert not any("broken.png" in names(row) for row in content["queries"])
    printed = capsys.readouterr().out
    assert f"1 image could not be read: {tmp_path / 'figure-skipped_images.txt'}" in printed
    (listed,) = (tmp_path / "features").glob("*/skipped_images.txt")
    assert "broken.png" in listed.read_text()
    assert f"1 image could not be read: {listed}" in printed


def test_neighbors_clamp_k(overrides, flat, capsys):
    content = run_neighbors(overrides, f"data.root={flat}", "k=500", "limit=1")
    assert len(content["queries"][0]["neighbors"]) == 47
    assert "k=500: there are only 47 other images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["images={tmp}/nowhere", "data.root={flat}"], "does not exist; name an image, or a folder of images"),
        (["images={tmp}/text.png", "data.root={flat}"], "none of the images can be read"),
        (["data.root={tmp}/one"], "only one image"),
        (["data.root={flat}", "out={tmp}/figure.pdf"], "must be a .png or .jpg file"),
        (["data.root={flat}", "k=0"], "k:"),
        (["data.root={flat}", "recall=1.5"], "recall:"),
        (["data.root={flat}", "data.image_size=33"], "data.image_size=32"),
    ],
)
def test_neighbors_report_user_errors(more, message, overrides, flat, tmp_path, capsys):
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "one").mkdir()
    shutil.copy(min(flat.iterdir()), tmp_path / "one" / "a.png")
    given = [override.format(tmp=tmp_path, flat=flat) for override in more]
    assert main(["neighbors", *overrides, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_neighbors_writes_jpeg(overrides, flat, tmp_path):
    run_neighbors(overrides, f"data.root={flat}", f"out={tmp_path / 'new' / 'figure.jpg'}", "limit=2")
    with Image.open(tmp_path / "new" / "figure.jpg") as figure:
        assert figure.format == "JPEG"
