"""SiT: the model of a checkpoint that restores images."""

import shutil

import pytest
import torch

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.commands.run_figures import reconstruction_figure
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.schedules import make_plan
from ssl_vit.methods.sit import SiT
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.trainer import build_method
from ssl_vit.visualization.first_step_views import read_run_settings
from tests.conftest import SHRUNK


@pytest.fixture(scope="module")
def run(sample, tmp_path_factory):
    """Return the directory of a SiT run of three steps."""
    overrides = [*SHRUNK, "method=sit", "trainer.max_steps=3", f"data.root={sample / 'train'}"]
    overrides.append(f"run.folder={tmp_path_factory.mktemp('restoring')}")
    return pretrain(load_config("pretrain", overrides, PretrainConfig))


def test_load_figures_restores_the_model_with_its_heads(run, pretrain_config):
    config = pretrain_config("method=sit", "trainer.max_steps=3")
    restorer = SiT.load_figures(run, config.method, config.backbone)["reconstruction"]
    method = build_method(config, make_plan(config, 192))
    method.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = method.student.eval()(x)[1]["reconstruction"]
    torch.testing.assert_close(restorer.restore(x), expected, rtol=1e-4, atol=1e-5)
    assert not restorer.model.training
    assert not any(parameter.requires_grad for parameter in restorer.model.parameters())


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
def test_load_figures_rejects_keys_that_do_not_fit(run, tmp_path, change):
    path = tmp_path / "changed.ckpt"
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    name = "student.heads.reconstruction.deconvolution.bias"
    if change == "missing":
        del content["state_dict"][name]
    elif change == "left over":
        content["state_dict"]["student.heads.color.bias"] = torch.zeros(3)
    else:
        content["state_dict"][name] = torch.zeros(4)
    torch.save(content, path)
    settings = read_run_settings(run)
    with pytest.raises(UserError, match=r"(?s)does not fit the run's config\.yaml.*heads\."):
        SiT.load_figures(path, settings.method, settings.backbone)


def test_load_figures_is_empty_without_reconstruction(run, tmp_path, pretrain_config):
    settings = read_run_settings(run)
    assert SiT.load_figures(run / "backbone.safetensors", settings.method, settings.backbone) == {}
    dino = pretrain_config()
    assert DINO.load_figures(run, dino.method, dino.backbone) == {}
    off = pretrain_config("method=sit", "method.reconstruction.enabled=false")
    assert SiT.load_figures(run, off.method, off.backbone) == {}
    shutil.copy(run / "config.yaml", tmp_path)  # without its checkpoints
    assert reconstruction_figure(tmp_path) is None
