"""Lists of images and names: encodings of other tools, paths that do not exist, names that lead elsewhere."""

import os

import pytest

from ssl_vit.data.annotations.davis import davis_clips
from ssl_vit.data.annotations.voc import VOCDataset
from ssl_vit.data.sources.image_folder import read_image_list
from ssl_vit.data.sources.path_lists import read_names, read_paths
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.segmentation_writer import SegmentationWriter

NAMES = ["p/1.png", "p/2 2.png", "p/Caf\u00e9.png"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(b"image")
    return tmp_path


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(NAMES).encode(),
        "\r\n".join(NAMES).encode() + b"\r\n\r\n",
        "\n".join(NAMES).encode("utf-8-sig"),
        "\r\n".join(NAMES).encode("utf-16"),
        b"\xfe\xff" + "\n".join(NAMES).encode("utf-16-be"),
    ],
)
def test_read_paths_takes_the_encodings_of_other_tools(folder, content):
    (folder / "list.txt").write_bytes(content)
    assert [os.fsdecode(path) for path in read_paths(folder / "list.txt")] == NAMES
    assert len(read_image_list(folder / "list.txt")) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name: f"{name}  ", "blanks at its end"),
        (lambda name: f'"{name}"', "quotes around it"),
        (lambda name: name.replace("/", "\\"), "backslashes"),
        (lambda name: f"{name} 7", "a label or another column after it"),
        (lambda name: f"{name},7", "a label or another column after it"),
        (lambda name: f"gone/{name}", "none of its first paths exists"),
    ],
)
def test_read_paths_explains_why_no_path_exists(folder, change, reason):
    (folder / "list.txt").write_text("\n".join(map(change, NAMES)))
    with pytest.raises(UserError, match=reason):
        read_paths(folder / "list.txt")


def test_read_paths_uses_a_path_once_and_reports_it(folder, caplog):
    (folder / "list.txt").write_text("\n".join(NAMES + NAMES[:2]))
    assert len(read_paths(folder / "list.txt")) == 3
    assert "2 paths listed again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfea", b"\x89PNG\0\0"])
def test_read_paths_refuses_what_is_no_list(folder, content):
    (folder / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt: (there is no path|no valid UTF-16|none of its first)"):
        read_paths(folder / "list.txt")


ESCAPES = ["/tmp/victim", "../victim", "a/../../victim", "C:\\victim", "..\\victim", "a\\..\\..\\victim"]


@pytest.mark.parametrize("name", ESCAPES)
def test_read_names_refuses_names_that_lead_out_of_the_dataset(tmp_path, name):
    listed = {"voc": "ImageSets/Segmentation/val.txt", "davis": "ImageSets/2017/val.txt"}
    for kind, file in listed.items():
        (tmp_path / kind / file).parent.mkdir(parents=True)
        (tmp_path / kind / file).write_text(f"good\n{name}\n")
        with pytest.raises(UserError, match="leads out of the dataset"):
            read_names(tmp_path / kind / file)
    (tmp_path / "voc" / "JPEGImages").mkdir()
    with pytest.raises(UserError, match="leads out"):
        VOCDataset(tmp_path / "voc", "val")
    with pytest.raises(UserError, match="leads out"):
        davis_clips(tmp_path / "davis", "val")
    with pytest.raises(UserError, match="leads out"):
        SegmentationWriter(tmp_path / "out", [name])
