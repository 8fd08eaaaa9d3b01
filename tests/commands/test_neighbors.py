"""`ssl-vit neighbors` finds what is nearest, says how surely, and shows it."""

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
from ssl_vit.evaluation.features.extractor import extract
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.visualization.neighbor_figure import TILE_SIDE
from tests.reference import probes


@pytest.fixture
def flat(sample, tmp_path):
    """48 images in one folder, without labels."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for file in (sample / "test").glob("*/*.png"):
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return folder


@pytest.fixture
def words(tiny_model, tmp_path):
    return [
        f"checkpoint={tiny_model}",
        "data.num_workers=0",
        f"out={tmp_path / 'sheet.png'}",
        f"features={tmp_path / 'features'}",
    ]


def found(words, *more):
    """What the command wrote as JSON."""
    assert main(["neighbors", *words, *more]) == 0
    out = [word.removeprefix("out=") for word in (*words, *more) if word.startswith("out=")]
    return json.loads(Path(out[-1]).with_suffix(".json").read_text(encoding="utf-8"))


def names(query):
    return [neighbor["name"] for neighbor in query["neighbors"]]


def test_the_nearest_of_an_image_among_unlabeled_ones(words, flat, tmp_path, capsys):
    query = sorted(flat.iterdir())[7]
    content = found(words, f"data.root={flat}", f"images={query}", "k=5")
    (row,) = content["queries"]
    assert (row["name"], row["class"]) == (query.name, None)
    assert names(row)[0] == query.name  # it lies among them
    cosines = [neighbor["cosine"] for neighbor in row["neighbors"]]
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines == sorted(cosines, reverse=True)
    assert all(neighbor["class"] is None for neighbor in row["neighbors"])
    assert content["search"] == {"index": "exact", "k": 5}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 6 * TILE_SIDE
    printed = capsys.readouterr().out
    assert str(tmp_path / "sheet.json") in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features", "flat", "sheet.json", "sheet.png"]


def test_the_sets_own_images_are_left_out_of_their_own_neighbors(words, sample, tiny_model, tmp_path):
    content = found(words, f"data.root={sample}", "k=6", "limit=9")
    dataset = scan_image_folder(sample / "train")  # where there is a training set, it is searched
    loaded = load_backbone(str(tiny_model))
    features = extract(
        loaded,
        dataset,
        EvalTransform(32, 0.875, loaded.mean, loaded.std),
        blocks=1,
        batch_size=64,
        num_workers=0,
        skipped=SkippedImageLog(tmp_path / "none.txt"),
    )
    every = features.cls[:, -1].double().numpy()
    expected = probes.nearest(every, every, 6, leave_one_out=True)
    place = {dataset.name(index): index for index in range(len(dataset))}
    assert len(content["queries"]) == 9
    for row in content["queries"]:
        assert [place[name] for name in names(row)] == expected[place[row["name"]]]
        assert row["class"] == row["name"].partition("/")[0]
    assert found(words, f"data.root={sample}", "k=6", "limit=9")["queries"] == content["queries"]
    other = found(words, f"data.root={sample}", "k=6", "limit=9", "seed=1")["queries"]
    assert [row["name"] for row in other] != [row["name"] for row in content["queries"]]


def test_an_index_finds_the_same_and_is_used_again(words, sample, flat, tmp_path, monkeypatch, capsys):
    data = [f"data.root={sample}", f"images={flat}", "k=4", "limit=10", "recall=1.0"]
    exact = found(words, *data)
    first = found(words, *data, "index=ivf")
    assert [names(row) for row in first["queries"]] == [names(row) for row in exact["queries"]]
    assert first["search"]["recall"] == 1
    assert first["search"]["measured_on"] == "images of the set itself, each by the others"
    assert "100.0% of the true neighbors found" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(IVFIndex, "build", lambda *_, **__: pytest.fail("it was built again"))
        assert found(words, *data, "index=ivf")["queries"] == first["queries"]
    (index,) = (tmp_path / "features").glob("*/*.ivf")
    index.write_bytes(b"damaged")
    assert found(words, *data, "index=ivf")["queries"] == first["queries"]
    assert "is not an index" in capsys.readouterr().out
    content = found(words, f"data.root={flat}", *data[1:], "index=ivf")  # other images
    assert content["search"]["queries"] == 24  # of 48 in all


def test_broken_images_are_skipped_with_a_word(words, flat, sample, tmp_path, capsys):
    (flat / "broken.png").write_bytes(b"no image")
    queries = tmp_path / "queries"
    shutil.copytree(sample / "test" / "red-dots", queries)
    (queries / "0000.png").write_bytes(b"no image")
    content = found(words, f"data.root={flat}", f"images={queries}")
    assert content["skipped"] == {"images": 1, "queries": 1}
    assert "0000.png" not in [row["name"] for row in content["queries"]]
    assert not any("broken.png" in names(row) for row in content["queries"])
    printed = capsys.readouterr().out
    assert f"1 could not be read: {tmp_path / 'sheet-skipped_images.txt'}" in printed
    (listed,) = (tmp_path / "features").glob("*/skipped_images.txt")
    assert "broken.png" in listed.read_text()
    assert f"1 could not be read: {listed}" in printed


def test_k_beyond_the_set_shows_all_others(words, flat, capsys):
    content = found(words, f"data.root={flat}", "k=500", "limit=1")
    assert len(content["queries"][0]["neighbors"]) == 47
    assert "k=500: there are only 47" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["images={tmp}/nowhere", "data.root={flat}"], "does not exist"),
        (["images={tmp}/text.png", "data.root={flat}"], "none of the images can be read"),
        (["data.root={tmp}/one"], "only one image"),
        (["data.root={flat}", "out={tmp}/sheet.pdf"], "must be a .png or .jpg file"),
        (["data.root={flat}", "k=0"], "k:"),
        (["data.root={flat}", "recall=1.5"], "recall:"),
        (["data.root={flat}", "data.image_size=33"], "data.image_size=32"),
    ],
)
def test_mistakes_are_told_in_words(more, told, words, flat, tmp_path, capsys):
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "one").mkdir()
    shutil.copy(min(flat.iterdir()), tmp_path / "one" / "a.png")
    given = [word.format(tmp=tmp_path, flat=flat) for word in more]
    assert main(["neighbors", *words, *given]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_a_jpeg_sheet(words, flat, tmp_path):
    found(words, f"data.root={flat}", f"out={tmp_path / 'new' / 'sheet.jpg'}", "limit=2")
    with Image.open(tmp_path / "new" / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
