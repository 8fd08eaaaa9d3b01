"""Tests of what belongs to a run: only folders that it wrote are replaced, only its own checkpoints are resumed."""

import shutil

import pytest
import torch
import yaml

from ssl_vit.cli import main
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.run_dir import lock_run_dir
from ssl_vit.training.run_identity import MARKER, check_deletable, read_run_id
from tests.helpers.cli import checkpoint, state

RUN_CONFIG = yaml.safe_dump({key: {} for key in ("run", "trainer", "data", "method")})


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "model: foo"},
        {"config.yaml": RUN_CONFIG},
        {"checkpoints/last.ckpt": "of another tool"},
        {"config.yaml": "model: foo", MARKER: "a run of another tool"},
        {"photo.jpg": ""},
        {"images/photo.jpg": "", "eval/notes.txt": ""},
    ],
    ids=lambda files: ", ".join(files),
)
@pytest.mark.parametrize("command", ["pretrain", "demo"])
def test_overwrite_leaves_folders_that_are_no_runs(pretrain_words, tmp_path, capsys, files, command):
    folder = tmp_path / "runs" / "thesis"
    for name, text in {**files, "thesis.tex": "ten years of work"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = pretrain_words() if command == "pretrain" else [f"run.folder={folder.parent}"]
    assert main([command, *words, "run.name=thesis", "run.overwrite=true"]) == 2
    assert str(folder) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert main([command, *words, "run.name=thesis"]) == 2  # nor does a new run begin among them
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_overwrite_through_a_link_replaces_the_run_behind_it(pretrain_config, tmp_path):
    run = pretrain(pretrain_config("run.name=r"))
    disk = tmp_path / "disk"
    disk.mkdir()
    real = run.rename(disk / "real")
    run.symlink_to(real)
    first = read_run_id(real)
    pretrain(pretrain_config("run.name=r", "run.overwrite=true", "trainer.max_steps=2"))
    assert run.is_symlink()
    assert state(real)[1] == 2
    assert read_run_id(real) != first
    pretrain(pretrain_config("run.name=r", "run.resume=true", "trainer.max_steps=2"))
    assert sorted(path.name for path in disk.iterdir()) == [".real.lock", "real"]


def test_overwrite_replaces_a_run_without_a_marker(pretrain_config):
    run = pretrain(pretrain_config())
    (run / MARKER).unlink()
    check_deletable(run)
    pretrain(pretrain_config("run.overwrite=true", "trainer.max_steps=2"))
    assert state(run)[1] == 2


def test_lock_run_dir_is_that_of_the_real_folder(pretrain_config, tmp_path):
    config = pretrain_config("run.name=r").run
    config.folder.mkdir()
    (tmp_path / "link").symlink_to(config.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "name").symlink_to(config.folder / "r")
    same = [
        config.model_copy(update={"folder": tmp_path / "link"}),
        config.model_copy(update={"folder": tmp_path / "other", "name": "name"}),
    ]
    with lock_run_dir(config):
        for other in same:
            with pytest.raises(UserError, match="another process is training"), lock_run_dir(other):
                pass


def test_lock_run_dir_in_a_folder_that_cannot_exist(pretrain_words, capsys):
    for folder in ("/proc/x", "/proc/self/x", "/dev/null", "/dev/null/x"):
        assert main(["pretrain", *pretrain_words(), f"run.folder={folder}"]) == 2
        message = capsys.readouterr().err
        assert f"run.folder={folder}" in message
        assert "another process" not in message


@pytest.mark.parametrize("other", ["seed=1", "method=sit", "backbone.embed_dim=48"])
def test_resume_refuses_the_checkpoint_of_another_run(pretrain_words, tmp_path, capsys, other):
    words = [word for word in pretrain_words(other) if not (other == "method=sit" and "prototypes" in word)]
    assert main(["pretrain", *pretrain_words("run.name=a")]) == 0
    assert main(["pretrain", *words, "run.name=b"]) == 0
    runs = tmp_path / "runs"
    own = (runs / "a" / "checkpoints" / "last.ckpt").read_bytes()
    shutil.copy(runs / "b" / "checkpoints" / "last.ckpt", runs / "a" / "checkpoints")
    capsys.readouterr()
    assert main(["pretrain", *pretrain_words("run.name=a", "run.resume=true")]) == 2
    message = capsys.readouterr().err
    assert "last.ckpt belongs to another run" in message
    (runs / "a" / "checkpoints" / "last.ckpt").write_bytes(own)
    assert main(["pretrain", *pretrain_words("run.name=a", "run.resume=true")]) == 0


def without_id(path):
    content = torch.load(path, weights_only=True)
    del content["ssl_vit_run"]
    torch.save(content, path)


def test_resume_reads_checkpoints_without_an_id(pretrain_config, stop_at):
    with stop_at(2):
        run = pretrain(pretrain_config())
    without_id(run / "checkpoints" / "last.ckpt")
    (run / MARKER).unlink()
    pretrain(pretrain_config("run.resume=true"))
    assert state(run)[1] == 4
    assert checkpoint(run)["ssl_vit_run"] == read_run_id(run)


def test_resume_refuses_weights_of_other_shapes_without_an_id(pretrain_config):
    other = pretrain(pretrain_config("run.name=other", "backbone.embed_dim=48", "trainer.max_steps=2"))
    run = pretrain(pretrain_config("trainer.max_steps=5"))
    without_id(other / "checkpoints" / "last.ckpt")
    shutil.copy(other / "checkpoints" / "last.ckpt", run / "checkpoints")
    with pytest.raises(UserError, match="is not of this run: its weights have other names or shapes"):
        pretrain(pretrain_config("run.resume=true", "trainer.max_steps=5"))


def test_checkpoints_of_a_folder_that_vanished_are_not_called_intact(pretrain_config, monkeypatch):
    from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint

    folder = pretrain_config().run.path
    original = RunCheckpoint.on_train_batch_end

    def vanish(self, trainer, *rest):
        original(self, trainer, *rest)
        if trainer.global_step == 2:
            folder.rename(folder.with_name("moved"))

    monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", vanish)
    with pytest.raises(UserError) as error:
        pretrain(pretrain_config("trainer.checkpoint_every=0s"))
    assert "intact" not in str(error.value)
    assert "is gone" in str(error.value)
