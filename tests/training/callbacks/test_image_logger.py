"""Tests of logged images: when they are drawn, of what, and that they do not change the run."""

import errno
import shutil
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import wandb
from PIL import Image

from ssl_vit.commands import run_figures
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.commands.run_figures import training_figures
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.attention_maps import cls_attention
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.training.callbacks import image_logger
from ssl_vit.training.callbacks.image_logger import MIN_STEPS, ImageLogger
from ssl_vit.training.run_dir import RunState
from ssl_vit.training.trainer import build_method
from tests.helpers.cli import assert_same_run, rows, state

EVERY_EPOCH = (
    "data.batch_size=64",
    "trainer.max_steps=7",
    "image_logging.every_epochs=1",
    "image_logging.num_images=3",
)  # of 3 steps


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    """Panels may follow each other closely."""
    monkeypatch.setattr(image_logger, "MIN_STEPS", 1)


def files(run):
    """Name and content."""
    return {path.name: path.read_bytes() for path in sorted((run / "images").iterdir())}


def names(kind, *steps):
    return [f"{kind}-{step:07d}.jpg" for step in steps]


def callback(config, root):
    dataset = scan_image_folder(root)
    plan = make_plan(config, len(dataset))
    skipped = SkippedImageLog(config.run.path / "skipped_images.txt")
    run = RunState(config.run.path, dataset, dataset, plan)
    render = training_figures(config, build_method(config, plan))
    return ImageLogger(config.image_logging, run, config.method.views, config.backbone, render=render, skipped=skipped)


# --- when, and of what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_image_logger_draws_at_the_start_after_epochs_and_at_the_end(pretrain_config, monkeypatch, capsys, method):
    drawn = []
    original = run_figures.make_overlay_inputs

    def record(pixels, maps, *rest):
        drawn.append((pixels, maps))
        return original(pixels, maps, *rest)

    monkeypatch.setattr(run_figures, "make_overlay_inputs", record)
    run = pretrain(pretrain_config(f"method={method}", *EVERY_EPOCH))
    kinds = ["attention", "reconstruction"] if method == "sit" else ["attention"]
    assert list(files(run)) == [name for kind in kinds for name in names(kind, 0, 3, 6, 7)]
    assert f"Images: {run / 'images'}" in capsys.readouterr().out
    for path in (run / "images").iterdir():
        with Image.open(path) as image:
            assert image.size[0] > 300
    # The last panel is of the weights that are exported: DINO's teacher.
    loaded = load_backbone(str(run))
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (loaded.mean, loaded.std))
    for pixels, maps in drawn[-3:]:
        expected = cls_attention(loaded.backbone, ((pixels / 255 - mean) / std)[None])[0, 0]
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-5)
    # The same images at all times.
    assert all(torch.equal(drawn[place][0], drawn[place % 3][0]) for place in range(len(drawn)))


def test_image_logger_draws_less_often_with_short_epochs(pretrain_config, sample, monkeypatch):
    monkeypatch.setattr(image_logger, "MIN_STEPS", MIN_STEPS)
    for words, every in (
        (("data.batch_size=64", "image_logging.every_epochs=1"), 67),  # of 3 steps
        (("data.batch_size=64", "image_logging.every_epochs=100"), 100),
        (("data.batch_size=1", "image_logging.every_epochs=1"), 2),  # of 192 steps
    ):
        config = pretrain_config(*words)
        assert callback(config, sample / "train").every == every


def test_image_logger_spreads_its_images_over_the_dataset(pretrain_config, sample):
    config = pretrain_config("image_logging.every_epochs=1", "image_logging.num_images=4")
    assert callback(config, sample / "train").indices == [24, 72, 120, 168]
    assert callback(
        pretrain_config("image_logging.every_epochs=1", "image_logging.num_images=500"), sample / "test"
    ).indices == [*range(48)]


def test_image_logger_draws_gray_images(pretrain_config):
    gray = ("backbone.in_chans=1", "method.views.mean=[0.5]", "method.views.std=[0.25]")
    run = pretrain(pretrain_config("method=sit", *gray, *EVERY_EPOCH, "trainer.max_steps=1"))
    assert list(files(run)) == [*names("attention", 0, 1), *names("reconstruction", 0, 1)]


def test_image_logger_draws_no_reconstruction_where_it_is_disabled(pretrain_config):
    words = ("method=sit", "method.reconstruction.enabled=false", *EVERY_EPOCH, "trainer.max_steps=1")
    assert list(files(pretrain(pretrain_config(*words)))) == names("attention", 0, 1)


def test_image_logger_draws_nothing_with_fsdp(pretrain_config, sample):
    config = pretrain_config("image_logging.every_epochs=1", "trainer.strategy=fsdp")
    unseen = callback(config, sample / "train")
    unseen.on_train_start(SimpleNamespace(global_step=0, is_global_zero=True), L.LightningModule())
    assert unseen.summary() == []
    assert not config.run.path.exists()


# --- the run stays what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_image_logger_does_not_change_the_run(pretrain_config, stop_at, method):
    # With drop path, by which a mode that is not restored would be seen.
    words = (f"method={method}", *EVERY_EPOCH, "backbone.drop_path=0.3")
    drawn = pretrain(pretrain_config(*words, "run.name=drawn"))
    without = pretrain(pretrain_config(*words, "run.name=without", "image_logging.every_epochs=null"))
    assert_same_run(drawn, without)
    assert not (without / "images").exists()
    with stop_at(4):
        resumed = pretrain(pretrain_config(*words, "run.name=resumed"))
    assert list(files(resumed)) == [name for name in files(drawn) if name.endswith(("0.jpg", "3.jpg"))]
    pretrain(pretrain_config(*words, "run.name=resumed", "run.resume=true"))
    assert_same_run(drawn, resumed)
    assert files(resumed) == files(drawn)


def test_image_logger_keeps_its_own_images_when_others_are_added(pretrain_config, sample, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    one = next((sample / "test").rglob("*.png"))
    for number in range(5):
        shutil.copy(one, folder / f"{number}.png")
    config = pretrain_config(
        "image_logging.every_epochs=1", "image_logging.num_images=3", f"image_logging.root={folder}"
    )

    def chosen(config, known):
        panels = callback(config, sample / "train")
        panels.load_state_dict(known)
        return panels.state_dict()["names"]

    began = callback(config, sample / "train").state_dict()
    assert began["names"] == ["0.png", "2.png", "4.png"]
    shutil.copy(one, folder / "1 a new one.png")
    assert chosen(config, began) == began["names"]
    (folder / "2.png").unlink()
    assert chosen(config, began) == ["0.png", "4.png"]
    more = pretrain_config("image_logging.every_epochs=1", "image_logging.num_images=5", f"image_logging.root={folder}")
    assert len(chosen(more, began)) == 5
    without = pretrain_config("image_logging.every_epochs=1", "image_logging.num_images=3")
    assert chosen(without, began) == []


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_image_logger_skips_unusable_images(pretrain_config, sample, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(next((sample / "test").rglob("*.png")), folder / "good.png")
    Image.new("RGB", (900, 3)).save(folder / "flat.png")  # lower than a patch
    (folder / "broken.png").write_bytes(b"nothing")
    run = pretrain(pretrain_config("method=sit", *EVERY_EPOCH, f"image_logging.root={folder}", "trainer.max_steps=1"))
    assert list(files(run)) == [*names("attention", 0, 1), *names("reconstruction", 0, 1)]
    listed = (run / "skipped_images.txt").read_text()
    assert listed.startswith("broken.png\t")
    assert len(listed.splitlines()) == 1


def test_image_logger_warns_once_without_usable_images(pretrain_config, tmp_path, caplog):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"nothing")
    run = pretrain(pretrain_config(*EVERY_EPOCH, f"image_logging.root={folder}"))
    assert state(run)[1] == 7
    assert caplog.text.count("no attention figure at step 0: none of the images can be used") == 1
    assert "step 3" not in caplog.text


def test_image_logger_survives_a_full_disk(pretrain_config, monkeypatch, caplog):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(image_logger, "atomic_write", full)
    run = pretrain(pretrain_config("method=sit", *EVERY_EPOCH))
    assert state(run)[1] == 7
    assert files(run) == {}
    for kind in ("attention", "reconstruction"):
        assert caplog.text.count(f"no {kind} figure") == 1
    assert "No space left" in caplog.text


def test_image_logger_survives_a_full_device(pretrain_config, monkeypatch, caplog):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(run_figures, "cls_attention", exhausted)
    run = pretrain(pretrain_config("method=sit", *EVERY_EPOCH, "trainer.max_steps=1"))
    assert list(files(run)) == names("reconstruction", 0, 1)
    assert caplog.text.count("no attention figure") == 1


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_image_logger_draws_nothing_of_a_diverged_model(pretrain_config, sample, tmp_path, caplog, method):
    config = pretrain_config(f"method={method}", *EVERY_EPOCH)
    model = build_method(config, make_plan(config, 192))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    shown = callback(config, sample / "train")
    shown.on_train_start(SimpleNamespace(global_step=0, is_global_zero=True, loggers=[]), model)
    assert "features are not finite" in caplog.text
    assert ("the reconstructions are not finite" in caplog.text) == (method == "sit")
    assert not list(tmp_path.rglob("*.jpg"))


# --- wandb -----------------------------------------------------------------------------------------------------


def test_image_logger_sends_images_to_wandb(pretrain_config, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.setup()  # as something else in this process may have: from then on it reads no environment
    run = pretrain(pretrain_config("method=sit", *EVERY_EPOCH, "logger=wandb", "logger.offline=true"))
    wandb.teardown()  # its process writes the files to their end
    sent = sorted(path.name for path in (run / "wandb").rglob("media/images/images/*.png"))
    assert [sum(name.startswith(kind) for name in sent) for kind in ("attention", "reconstruction")] == [4, 4]
    assert not any("images/" in column for column in rows(run)[0])
