"""Figures of a run: its first views and its reconstructions."""

import shutil

import pytest
import yaml

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.commands.run_figures import reconstruction_figure, training_views_figure
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.run_dir import write_run_metadata
from ssl_vit.visualization.first_step_views import read_run_settings, views_figure
from tests.conftest import SHRUNK
from tests.helpers.views import load_views, settings_of


def test_training_views_figure_of_a_run_of_an_earlier_version(pretrain_config, sample, tmp_path):
    config = pretrain_config("method=sit")
    values = config.model_dump(mode="json")
    del values["online"], values["trainer"], values["image_logging"]
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"online_knn": {"k": 20}}))
    assert read_run_settings(run) == settings_of(config)
    figure = training_views_figure(run, count=2)
    assert "first 2 images" in figure.text
    assert "stored no image list" in figure.text
    assert "2 global views of 48 px" in figure.text
    dataset = scan_image_folder(sample / "train")
    assert figure.image.tobytes() == views_figure(load_views(config, dataset, tmp_path, count=2)).tobytes()


def test_training_views_figure_ignores_new_images_and_reports_changed_ones(pretrain_config, sample, tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(sample / "train", folder)
    run.mkdir()
    config = pretrain_config("method=dino", f"data.root={folder}", f"run.folder={tmp_path}", "run.name=run")
    write_run_metadata(config, scan_image_folder(folder))
    first = training_views_figure(run, count=2)
    assert "did not write down" not in first.text
    one = next(path for path in folder.rglob("*") if path.is_file())
    shutil.copy(one, one.with_name(f"0{one.suffix}"))
    assert training_views_figure(run, count=2).image.tobytes() == first.image.tobytes()
    one.unlink()
    with pytest.raises(UserError, match="images have changed"):
        training_views_figure(run, count=2)
    (run / "data.json").write_text("[]")
    with pytest.raises(UserError, match="images have changed"):
        training_views_figure(run, count=2)


def test_reconstruction_figure_of_a_run(sample, tmp_path):
    overrides = [
        *SHRUNK,
        "method=sit",
        "trainer.max_steps=3",
        f"data.root={sample / 'train'}",
        f"run.folder={tmp_path}",
    ]
    run = pretrain(load_config("pretrain", overrides, PretrainConfig))
    figure = reconstruction_figure(run, count=4)
    assert figure.text.startswith("4 images, corrupted as in training")
    assert "mean color has L1 0." in figure.text
    assert figure.image.width <= 900
    from_checkpoint = reconstruction_figure(run, run / "checkpoints" / "last.ckpt", count=4)
    assert from_checkpoint.image.tobytes() == figure.image.tobytes()
    (run / "checkpoints" / "last.ckpt").unlink()
    assert reconstruction_figure(run) is None
