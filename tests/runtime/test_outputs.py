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
            check_outputs([out], "knn", inputs={"images": images}, is_own=True)
    check_outputs([tmp_path / "out" / "maps"], "knn", inputs={"images": images, "masks": None})


def test_check_outputs_replaces_recorded_files_only(tmp_path):
    file, folder = tmp_path / "table.csv", tmp_path / "masks"
    check_outputs([file, folder], "knn", inputs={})
    folder.mkdir()
    check_outputs([folder], "knn", inputs={})  # empty
    (folder / "x.png").write_bytes(b"of the user")
    file.write_bytes(b"of the user")
    for path in (file, folder):
        with pytest.raises(UserError, match="exists and is not of ssl-vit"):
            check_outputs([path], "knn", inputs={})
        check_outputs([path], "knn", inputs={}, is_own=True)
    record_outputs([file, folder], "knn")
    check_outputs([file, folder], "knn", inputs={})
    with pytest.raises(UserError, match="was written by `ssl-vit knn`: choose another out="):
        check_outputs([file], "neighbors", inputs={})
    (tmp_path / ".ssl-vit-outputs").write_text("damaged")
    with pytest.raises(UserError, match="is not of ssl-vit"):
        check_outputs([file], "knn", inputs={})


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_check_outputs_refuses_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"):
        check_outputs([tmp_path / "new" / "file"], "knn", inputs={})


def test_check_outputs_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written to"):
        check_outputs([tmp_path / "file" / "x.json"], "knn", inputs={})


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


def test_export_asks_before_it_replaces_a_side_file_or_its_own_source(tiny_model, tmp_path, capsys):
    (tmp_path / "x.json").write_text("mine")
    command = ["export", f"checkpoint={tiny_model}", f"out={tmp_path / 'x.safetensors'}"]
    assert main(command) == 2
    assert "x.json exists and is not of ssl-vit" in capsys.readouterr().err
    assert (tmp_path / "x.json").read_text() == "mine"
    assert main([*command, "overwrite=true"]) == 0
    assert main(command) == 0  # an export of its own
    own = tmp_path / "x.safetensors"
    assert main(["export", f"checkpoint={own}", f"out={own}"]) == 2
    assert "would be written over checkpoint=" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["attention", "propagate", "inspect", "transfer", "report"])
def test_no_command_replaces_files_beside_a_foreign_json(command, tiny_model, sample, tmp_path, capsys):
    """A `summary.json` of the user's is no sign that his masks are outputs."""
    out = tmp_path / "out"
    for name in ("summary.json", "inspect.json", "transfer.json", "transfer.md", "page.json", "page.html"):
        (out / "masks").mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"my": "own"}')
    (out / "masks" / "000000.png").write_bytes(b"mine")
    (out / "arrays.npz").write_bytes(b"mine")
    images = next((sample / "test").iterdir())
    words = {
        "attention": [f"checkpoint={tiny_model}", f"images={images}", f"out={out}"],
        "propagate": [f"checkpoint={tiny_model}", f"frames={images}", f"masks={sample / 'test_masks'}", f"out={out}"],
        "inspect": [f"checkpoint={tiny_model}", f"images={images}", f"out={out}"],
        "transfer": [f"checkpoints=[{tiny_model}]", f"data.roots=[{sample}]", f"out={out}"],
        "report": [f"run={tmp_path / 'run'}", f"out={out / 'page.html'}"],
    }
    if command == "report":
        (tmp_path / "run").mkdir()
        for suffix in (".safetensors", ".json"):
            (tmp_path / "run" / f"backbone{suffix}").write_bytes(tiny_model.with_suffix(suffix).read_bytes())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([command, *words[command]]) == 2
    assert "is not of ssl-vit" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["knn", "linear", "features", "neighbors"])
@pytest.mark.parametrize("key", ["train", "test"])
def test_no_result_is_written_among_the_labeled_images(command, key, tiny_model, sample, capsys):
    suffix = {"features": ".npz", "neighbors": ".png"}.get(command, ".json")
    out = next((sample / key).iterdir()) / f"result{suffix}"
    words = [f"checkpoint={tiny_model}", f"data.train={sample / 'train'}", f"data.test={sample / 'test'}", f"out={out}"]
    assert main([command, *words, *(["to=npz"] if command == "features" else [])]) == 2
    assert f"would be written over data.{key}=" in capsys.readouterr().err
    assert not out.exists()
