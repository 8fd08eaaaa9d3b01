"""Outputs never replace inputs or files of others; own files are replaced."""

import os

import pytest

from ssl_vit.cli import main
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.outputs import check_outputs, record_outputs


def test_check_outputs_refuses_inputs_in_any_position(tmp_path):
    images = tmp_path / "out" / "heads"
    images.mkdir(parents=True)
    (tmp_path / "link").symlink_to(images)
    for out in (images, images / "below", tmp_path / "out", tmp_path / "link"):
        with pytest.raises(UserError, match="would be written over images="):
            check_outputs([out], inputs={"images": images}, is_own=True)
    check_outputs([tmp_path / "out" / "maps"], inputs={"images": images, "masks": None})


def test_check_outputs_replaces_recorded_files_only(tmp_path):
    file, folder = tmp_path / "table.csv", tmp_path / "masks"
    check_outputs([file, folder], inputs={})
    folder.mkdir()
    check_outputs([folder], inputs={})  # empty
    (folder / "x.png").write_bytes(b"of the user")
    file.write_bytes(b"of the user")
    for path in (file, folder):
        with pytest.raises(UserError, match="exists and is not of ssl-vit"):
            check_outputs([path], inputs={})
        check_outputs([path], inputs={}, is_own=True)
    record_outputs([file, folder])
    check_outputs([file, folder], inputs={})
    (tmp_path / ".ssl-vit-outputs").write_text("damaged")
    with pytest.raises(UserError, match="is not of ssl-vit"):
        check_outputs([file], inputs={})


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_check_outputs_refuses_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"):
        check_outputs([tmp_path / "new" / "file"], inputs={})


def test_check_outputs_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written to"):
        check_outputs([tmp_path / "file" / "x.json"], inputs={})


@pytest.mark.parametrize("kind", ["heads", "masks", "maps", "overlays"])
def test_attention_never_writes_over_its_images(kind, sample, tiny_model, tmp_path, capsys):
    images = tmp_path / kind
    images.mkdir()
    source = next((sample / "test").rglob("*.png"))
    (images / "a.png").write_bytes(source.read_bytes())
    assert main(["attention", f"checkpoint={tiny_model}", f"images={images}", f"out={tmp_path}"]) == 2
    assert "would be written over images=" in capsys.readouterr().err
    assert (images / "a.png").read_bytes() == source.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name not in ("runs", kind)] == []


def test_knn_keeps_a_file_that_is_no_result(sample, tiny_model, tmp_path, capsys):
    out = tmp_path / "notes.json"
    out.write_text("{}")
    assert main(["knn", f"checkpoint={tiny_model}", f"data.root={sample}", f"out={out}", "baselines=false"]) == 2
    assert "is not of ssl-vit" in capsys.readouterr().err
    assert out.read_text() == "{}"
