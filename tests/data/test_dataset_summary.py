"""`ssl-vit scan`: what it counts, what it warns of, and that nothing stops it."""

import json

import numpy as np
import pytest
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.data.dataset_summary import summarize_dataset
from ssl_vit.data.sources.image_folder import scan_image_folder

RNG = np.random.default_rng(0)


def put(root, name, size=(40, 30), mode="RGB", **options):
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(root / name, **options)


@pytest.fixture
def messy(tmp_path):
    """A data set in two parts with some of everything."""
    root = tmp_path / "photos"
    turned = Image.Exif()
    turned[0x0112] = 6
    put(root, "train/cat/1.jpg")
    put(root, "train/cat/2.JPG", size=(100, 20), exif=turned)
    put(root, "train/cat/3.png", mode="RGBA")
    put(root, "train/dog/1.gif", mode="P")
    put(root, "test/cat/1.jpg", mode="CMYK")
    put(root, "test/dog/really_png.jpg", format="PNG")
    for copy in ("train/dog/copy.jpg", "test/cat/leak.jpg"):
        (root / copy).write_bytes((root / "train/cat/1.jpg").read_bytes())
    (root / "train/dog/empty.jpg").touch()
    (root / "train/dog/empty too.jpg").touch()
    (root / "test/dog/new\nline.png").write_bytes((root / "train/cat/3.png").read_bytes()[:500])
    (root / "test/dog/gone.png").symlink_to("nowhere.png")
    (root / "labels.csv").write_text("a,b")
    return root


def test_summarize_dataset_counts_everything(messy):
    report = summarize_dataset(scan_image_folder(messy))
    assert report.num_images == 12
    assert report.extensions == {".jpg": 8, ".png": 3, ".gif": 1}
    assert report.formats == {"JPEG": 5, "GIF": 1, "PNG": 2}
    assert report.modes == {"RGB": 5, "CMYK": 1, "P": 1, "RGBA": 1}
    assert report.short_side == {"0": 20, "5": 24, "50": 30, "95": 30, "100": 30}
    assert report.long_side["100"] == 100
    assert report.memory_bytes == 3 * (7 * 40 * 30 + 100 * 20)
    assert report.bytes == sum(file.stat().st_size for file in messy.rglob("*/*/*") if file.exists())
    assert report.rotated == ["train/cat/2.JPG"]
    assert report.classes == {"test": {"cat": 2, "dog": 3}, "train": {"cat": 3, "dog": 4}}
    assert report.unreadable.keys() == {
        "train/dog/empty.jpg",
        "train/dog/empty too.jpg",
        r"test/dog/new\nline.png",
        "test/dog/gone.png",
    }
    assert report.unreadable["test/dog/gone.png"] == "No such file or directory"
    assert report.duplicates == [["test/cat/leak.jpg", "train/cat/1.jpg", "train/dog/copy.jpg"]]
    assert report.leaks == report.duplicates
    assert report.ignored == {".csv": 1}


def test_scan_command_prints_a_summary_and_writes_all_names(messy, tmp_path, capsys):
    assert main(["scan", f"data.root={messy}", f"out={tmp_path / 'report'}"]) == 0
    shown = capsys.readouterr().out
    assert "12 images" in shown
    assert "4 cannot be read and will be skipped" in shown
    assert "train/dog/empty.jpg: an empty file" in shown
    assert "2 exact duplicates of other images" in shown
    assert "1 of train/ also in val/ or test/" in shown
    written = json.loads((tmp_path / "report" / "scan.json").read_text(encoding="utf-8"))
    assert written == summarize_dataset(scan_image_folder(messy))._asdict()


def test_as_text_truncates_long_lists(tmp_path):
    for i in range(11):
        (tmp_path / f"{i}.jpg").write_bytes(b"x" * i)
    report = summarize_dataset(scan_image_folder(tmp_path))
    assert len(report.unreadable) == 11
    assert "... and 3 more" in report.as_text()


def test_scan_command_takes_folders_and_lists(tmp_path, capsys):
    put(tmp_path, "a/1.png")
    put(tmp_path, "b/2.png")
    (tmp_path / "list.txt").write_text("a/1.png\n")
    assert main(["scan", f"data.root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "All images can be read" in shown
    assert "2, 1 image each" in shown
    assert "1 .txt" in shown
    assert main(["scan", "data.source=list", f"data.root={tmp_path / 'list.txt'}"]) == 0
    assert "1 image, " in capsys.readouterr().out


def test_scan_command_mistakes_end_with_a_message(tmp_path, capsys):
    assert main(["scan", f"data.root={tmp_path / 'nowhere'}"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["scan", f"data.root={tmp_path}"]) == 2
    assert "it is empty" in capsys.readouterr().err
